"""Studies of the package: a folder each, and `shared`, what they have in common."""

import importlib.util

NEEDED = ("matplotlib", "pandas", "PIL", "rich", "scipy", "sklearn", "tabulate", "tyro")
"""Modules that the extra "experiments" brings."""

if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    # Named after this package, the error is shown by `python -m` as one line.
    raise ImportError(
        f'the extra "experiments" is missing (no {", ".join(missing)}): pip install -e ".[experiments]"',
        name=__name__,
    )
