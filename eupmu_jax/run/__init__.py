"""A whole run: batches, evaluation, checkpoints, metrics. Its folder needs the extra "run"."""
