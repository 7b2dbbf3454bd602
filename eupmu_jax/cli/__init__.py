"""The command line, the model files that it takes, and the report of a run. Needs the extra "cli"."""
