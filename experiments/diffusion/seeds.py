"""One table of several runs of a task, as means and ranges.

python -m experiments.diffusion.seeds runs/diffusion-.../digits runs/diffusion-.../digits
"""

import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from experiments.shared.records import RecordsByKey, read_records
from experiments.shared.report import ORIGINAL, Frame


def rise(records: RecordsByKey, name: str) -> float:
    """How much the denoising loss of what is kept rose over the original's, of what it was."""
    of = lambda name: records["look", name]["losses"]["kept, train"]
    return of(name) / of(ORIGINAL) - 1


COLUMNS: dict[str, Callable[[RecordsByKey, str], float]] = {
    "still drawn": lambda records, name: next(iter(records["look", name]["still"].values())),
    "others right": lambda records, name: records["look", name]["right"],
    "near right": lambda records, name: records["look", name].get("right, near", np.nan),
    "feature distance": lambda records, name: records["look", name]["distance"],
    "loss of the kept": rise,
    "relearned": lambda records, name: records["relearn", name]["still"][1],
    "another embedding": lambda records, name: records["search", name]["still"][-1],
    "guidance 8": lambda records, name: records["guide", name]["still"][-1],
}
"""Of a model; relearned for a quarter of the steps."""


def cell(column: str, values: Sequence[float]) -> str:
    """The mean, and the lowest and the highest where there are several."""
    form = {"loss of the kept": "{:+.1%}", "feature distance": "{:.1f}"}.get(column, "{:.3f}").format
    if np.isnan(values).any():
        return "-"
    mean = form(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form(min(values))} to {form(max(values))})"


def table(runs: Sequence[RecordsByKey]) -> Frame:
    """Every model that any of the runs looked at; "runs" says how many."""
    names = dict.fromkeys(key[1] for run in runs for key in run if key[0] == "look")
    lines = {}
    for name in names:
        own = [run for run in runs if ("guide", name) in run]
        cells = {column: cell(column, [of(run, name) for run in own]) for column, of in COLUMNS.items()}
        lines[name] = {"runs": str(len(own)), **cells}
    found = pd.DataFrame.from_dict(lines, orient="index")
    return found.loc[:, (found != "-").any()]


if __name__ == "__main__":
    runs = [read_records(pathlib.Path(folder) / "records.jsonl") for folder in sys.argv[1:]]
    print(table(runs).to_markdown(disable_numparse=True))
