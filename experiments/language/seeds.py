"""The runs of several seeds side by side: which goals hold in each, and what each method left and cost."""

import dataclasses
import pathlib

import pandas as pd

from eupmu_jax.run.files import write_whole
from experiments.language.report import goals_table, rises
from experiments.language.study import BUDGETS, HEADLINE, METHODS, ORIGINAL, REFERENCE
from experiments.shared import command
from experiments.shared.records import RecordsByKey, read_records
from experiments.shared.report import Frame, saved_config


@dataclasses.dataclass(frozen=True)
class Config:
    """Put finished runs of `python -m experiments.language` with other seeds side by side.

    Writes two tables and a verdict to the file, as Markdown: the goals by seed, and the methods that all
    runs have.
    """

    runs: tuple[pathlib.Path, ...]
    """The folders of the runs."""

    out: pathlib.Path
    """The file, for instance seeds.md."""


def goals_of_seeds(by_seed: dict[int, RecordsByKey]) -> Frame:
    """What each seed measured for each goal; a goal that is not met says so."""
    said = lambda goals: [
        seen if met == "yes" else f"{seen}: **not met**"
        for seen, met in zip(goals["measured"], goals["met"], strict=True)
    ]
    tables = {f"seed {seed}": goals_table(records) for seed, records in by_seed.items()}
    return pd.DataFrame({seed: pd.Series(said(goals), goals.index) for seed, goals in tables.items()})


def methods_of_seeds(by_seed: dict[int, RecordsByKey]) -> Frame:
    """Of every method that all seeds have, one figure a seed."""
    lines = {}
    for name in (ORIGINAL, REFERENCE, *METHODS):
        if not all(("look", name) in records for records in by_seed.values()):
            continue
        looks = [records["look", name]["scores"] for records in by_seed.values()]
        each = lambda values, form: " / ".join(format(value, form) for value in values)
        lines[name] = {
            "forgotten: verbatim": each([of["forgotten"]["verbatim"] for of in looks], "d"),
            "details: greedy": each([of["forgotten, details"]["memorised"] for of in looks], ".3f"),
            "details: nats": each([of["forgotten, details"]["nats"] for of in looks], ".2f"),
            "others: verbatim": each([of["others"]["verbatim"] for of in looks], "d"),
        }
        if name in METHODS:
            rose = [rises(records, name) for records in by_seed.values()]
            for part, budget in sorted(BUDGETS.items()):
                lines[name][f"{part}: rise, of {budget:g}"] = each([one[part] for one in rose], "+.3f")
    return pd.DataFrame.from_dict(lines, orient="index").fillna("")


def verdict(by_seed: dict[int, RecordsByKey]) -> str:
    """On how many seeds the headline method meets all goals."""
    met = sum(all(goals_table(records)["met"] == "yes") for records in by_seed.values())
    return f"{HEADLINE} meets all goals on {met} of {len(by_seed)} seeds."


def main(config: Config) -> None:
    by_seed = {
        saved_config(run, "language")["seed"]: read_records(run / "records.jsonl") for run in config.runs
    }
    if len(by_seed) < len(config.runs):
        raise ValueError("--runs: two of them have the same seed")
    for seed, records in by_seed.items():
        if ("tune", HEADLINE, "prose") not in records:
            raise ValueError(f"--runs: the run of seed {seed} is not finished")
    tables = [goals_of_seeds(by_seed), methods_of_seeds(by_seed)]
    parts = [table.to_markdown(disable_numparse=True) for table in tables] + [verdict(by_seed)]
    write_whole(config.out, "\n\n".join(parts) + "\n")
    print(*parts, sep="\n\n")


if __name__ == "__main__":
    command.run(main, Config, resumable=False)
