"""The tables and pictures of the benchmarks, and whether their goals are met."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.benchmarks import growth, models, peers
from experiments.benchmarks.steps import BUDGET, FLOOR, LAGGED, LOOKAHEAD
from experiments.benchmarks.timing import Spread, ratios
from experiments.shared.records import Record, RecordsByKey, of_kind
from experiments.shared.report import (
    Frame,
    Origin,
    Picture,
    Section,
    grid,
    looks_of,
    plain_numbers,
    save,
    write_csv,
)
from experiments.shared.report import write_report as write_sections

COSTS = {
    "flops": "FLOPs",
    "bytes_accessed": "bytes",
    "peak_bytes": "peak memory",
    "compile_seconds": "compile time",
}
"""What a compiled step costs, and the columns that hold it relative to the floor."""

HOW = (
    "All relative to linear scalarisation in JAX on the same model and batches, with the same inner "
    "optimiser. FLOPs, bytes and peak memory are those of the compiled step; the peak is arguments + outputs "
    "+ temporaries - what is overwritten. Times: the median of the rounds, each relative to the floor in the "
    "same round, and the quartiles; programs take turns (A B C A B C) in one process on the same two cores. "
    '"calls" is a compiled call for each step, none of which the host waits for, "scan" many steps in one '
    'call, and "calls / scan" the first over the second.'
)


def rows_frame(records: RecordsByKey) -> Frame:
    """A line for each model and row: what it costs and takes, and that relative to the floor."""
    lines = []
    order = list(models.MODELS)
    for record in sorted(of_kind(records, "model"), key=lambda record: order.index(record["key"][1])):
        calls, scans, costs = record["seconds"]["calls"], record["seconds"]["scan"], record["costs"]
        for name, seconds in calls.items():
            line: dict[str, Any] = {"model": record["key"][1], "row": name}
            line |= {"parameters": record["parameters"], "frozen": record["frozen"]}
            line |= costs.get(name, {})
            for cost, column in COSTS.items():
                if name in costs:
                    line[column] = costs[name][cost] / costs[FLOOR][cost]
            line["milliseconds"] = 1e3 * float(np.median(seconds))
            line |= spread_columns("calls", ratios(seconds, calls[FLOOR]))
            if name in scans:
                line |= spread_columns("scan", ratios(scans[name], scans[FLOOR]))
                line |= spread_columns("calls / scan", ratios(seconds, scans[name]))
            lines.append(line)
    return pd.DataFrame(lines)


def spread_columns(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}, low": spread.low, f"{name}, high": spread.high}


def growth_frame(records: RecordsByKey) -> Frame:
    """A line for each point of each axis and row."""
    lines = []
    for record in of_kind(records, "growth"):
        _, axis, value = record["key"]
        for name, costs in record["costs"].items():
            line = {"axis": axis, "value": value, "row": name} | costs
            if name in record["seconds"]:
                line["seconds"] = float(np.median(record["seconds"][name]))
            lines.append(line)
    return pd.DataFrame(lines)


def number(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    value = row.get(name, np.nan)
    return "-" if pd.isna(value) else f"{value:.{digits}f}"


def with_spread(row: Mapping[str, Any], name: str) -> str:
    """A median and its quartiles."""
    if pd.isna(row.get(name, np.nan)):
        return "-"
    return f"{number(row, name)} ({number(row, f'{name}, low')} to {number(row, f'{name}, high')})"


def model_table(rows: Frame) -> Frame:
    """All rows of one model."""
    lines = {}
    for _, row in rows.iterrows():
        lines[row["row"]] = (
            {column: number(row, column, 3) for column in list(COSTS.values())[:3]}
            | {"compile time": number(row, "compile time")}
            | {name: with_spread(row, name) for name in ("calls", "scan", "calls / scan")}
            | {"ms a step": number(row, "milliseconds", 3)}
        )
    return pd.DataFrame(lines).T


class Goal(NamedTuple):
    """What is hoped for on every model: in `worst`, no model is above `most`.

    Attributes:
      text: the goal.
      values: by model.
      most: the largest that keeps it.
    """

    text: str
    values: dict[str, float]
    most: float

    @property
    def kept(self) -> bool:
        return all(value <= self.most for value in self.values.values())

    def line(self) -> dict[str, str]:
        good = sum(value <= self.most for value in self.values.values())
        worst = max(self.values, key=lambda model: self.values[model])
        return {
            "goal": f"<= {self.most:g}",
            "kept on": f"{good} of {len(self.values)} models",
            "worst": f"{self.values[worst]:.3f} ({worst})",
        }


def goals_of(rows: Frame, runs: Iterable[Record]) -> list[Goal]:
    """All goals for which something was measured."""

    def column(method: str, name: str) -> dict[str, float]:
        found = rows[rows["row"] == method]
        return {row["model"]: row[name] for _, row in found.iterrows() if not pd.isna(row.get(name, np.nan))}

    def beside(method: str, peer: str) -> dict[str, float]:
        ours, theirs = column(method, "calls"), column(peer, "calls")
        return {model: ours[model] / theirs[model] for model in ours if model in theirs}

    goals = [
        Goal(f"{method}, {name}", column(method, name), 1.02)
        for method in (BUDGET, LAGGED)
        for name in ("FLOPs", "peak memory", "calls")
    ]
    flops = column(LOOKAHEAD, "FLOPs")
    over = {model: time - flops[model] for model, time in column(LOOKAHEAD, "calls").items()}
    goals.append(Goal(f"{LOOKAHEAD}, calls less FLOPs", over, 0.03))
    for method in (FLOOR, BUDGET, LOOKAHEAD):
        goals.append(Goal(f"{method}, calls / scan", column(method, "calls / scan"), 1.02))
    for method in (BUDGET, LAGGED, LOOKAHEAD):
        goals.append(Goal(f"{method}, compile time", column(method, "compile time"), 1.5))
    for peer in (*peers.AGGREGATORS, peers.COOPER, peers.TORCH_LAGGED):
        goals.append(Goal(f"{LAGGED} over {peer}", beside(LAGGED, peer), 1.0))
    # Where PyTorch's own floor is faster, this compares what the method adds to a floor.
    theirs, floor = column(peers.TORCH_LAGGED, "calls"), column(peers.TORCH_FLOOR, "calls")
    added = {model: column(LAGGED, "calls")[model] / (theirs[model] / floor[model]) for model in theirs}
    goals.append(Goal(f"{LAGGED} over its floor, by PyTorch's over its own", added, 1.0))
    whole = {record["key"][1]: ratios(record["unlearn"], record["bare"]).median for record in runs}
    goals.append(Goal("unlearn over its bare steps, a step", whole, 1.05))
    return [goal for goal in goals if goal.values]


def goals_table(goals: list[Goal]) -> Frame:
    return pd.DataFrame({goal.text: goal.line() for goal in goals}).T


def verdict(goals: list[Goal]) -> str:
    """How many goals are kept, and which are not."""
    missed = [goal.text for goal in goals if not goal.kept]
    kept = f"{len(goals) - len(missed)} of {len(goals)} goals are kept on every model."
    return kept if not missed else f"{kept} Missed: {'; '.join(missed)}."


def runs_table(runs: Iterable[Record]) -> Frame:
    """`unlearn` against bare steps."""
    lines = {}
    for record in runs:
        spread = ratios(record["unlearn"], record["bare"])
        lines[record["key"][1]] = {
            "a step / bare": f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})",
            "ms a bare step": f"{1e3 * np.median(record['bare']):.2f}",
            "whole run, s": f"{record['seconds']:.1f}",
            "of which no step, s": f"{record['rest']:.1f}",
        }
    return pd.DataFrame(lines).T


def growth_table(points: Frame, axis: str) -> Frame:
    """The fitted exponents of an axis by row."""
    lines = {}
    of_axis = points[points["axis"] == axis]
    for name in dict.fromkeys(of_axis["row"]):
        own = of_axis[of_axis["row"] == name].sort_values("value")
        lines[name] = {
            label: exponent_text(own, column)
            for column, label in {
                "flops": "FLOPs",
                "bytes_accessed": "bytes",
                "peak_bytes": "peak memory",
                "seconds": "time",
            }.items()
        }
    return pd.DataFrame(lines).T


def exponent_text(points: Frame, column: str) -> str:
    found = points[points[column].notna()] if column in points else points[:0]
    if len(found) < 2:
        return "-"
    # The sum turns -0.0 into 0.0.
    return f"{round(growth.exponent(list(found['value']), list(found[column])), 2) + 0.0:.2f}"


def plot_times(path: pathlib.Path, rows: Frame) -> None:
    """Time of a step relative to the floor, by model, with the quartiles."""
    names = list(dict.fromkeys(rows["model"]))
    figure, axes = grid(len(names), 3, 5.5, 0.9 + 0.24 * rows["row"].nunique())
    looks = looks_of({row: "EUPMU" if row.startswith("EUPMU") else "other" for row in rows["row"]})
    for axis, name in zip(axes, names, strict=True):
        own = rows[rows["model"] == name]
        spread = np.abs(own[["calls, low", "calls, high"]].to_numpy().T - own["calls"].to_numpy())
        colours = [looks[row].color for row in own["row"]]
        axis.barh(own["row"], own["calls"], xerr=spread, color=colours, ecolor="grey")
        axis.axvline(1, color="black", linewidth=0.8)
        if own["calls"].max() > 5:
            axis.set_xscale("log")
            plain_numbers(axis.xaxis)
        axis.invert_yaxis()
        axis.set(title=name, xlabel="time / linear scalarisation in JAX")
    save(figure, path)


def plot_growth(path: pathlib.Path, points: Frame) -> None:
    """Memory and FLOPs against each axis."""
    names = list(dict.fromkeys(points["axis"]))
    figure, axes = grid(2 * len(names), 2, 5.5, 3)
    looks = looks_of({row: "EUPMU" if row.startswith("EUPMU") else "other" for row in points["row"]})
    for i, name in enumerate(names):
        for axis, (column, label) in zip(
            axes[2 * i : 2 * i + 2],
            {"flops": "FLOPs of a step", "peak_bytes": "peak memory, bytes"}.items(),
            strict=True,
        ):
            for row in dict.fromkeys(points["row"]):
                own = points[(points["axis"] == name) & (points["row"] == row)].sort_values("value")
                axis.loglog(
                    own["value"], own[column], label=row, linestyle=looks[row].line, **looks[row].mark
                )
            axis.set(xlabel=name, ylabel=label)
            axis.set_xticks(sorted(set(points["value"][points["axis"] == name])))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
    save(figure, path, legend=4)


def write_report(path: pathlib.Path, records: RecordsByKey, origin: Origin) -> list[Section]:
    """All tables and pictures; returns the sections, of which the first begins with the verdict."""
    rows, points, runs = rows_frame(records), growth_frame(records), of_kind(records, "run")
    write_csv(path / "rows.csv", rows, origin)
    write_csv(path / "growth.csv", points, origin)
    plot_times(path / "times.png", rows)
    plot_growth(path / "growth.png", points)
    goals = goals_of(rows, runs)
    measured = set(rows["row"])
    lacking = [row for rows_of in peers.NEEDS.values() for row in rows_of if row not in measured]
    said = (
        [f'Not measured, for the extra "benchmarks" is not installed: {", ".join(lacking)}.']
        if lacking
        else []
    )
    sections = [
        Section("Goals", [verdict(goals), *said, goals_table(goals)]),
        Section("Time of a step", [HOW, Picture("times.png")]),
    ]
    for name in dict.fromkeys(rows["model"]):
        own = rows[rows["model"] == name]
        trained, frozen = int(own["parameters"].iloc[0]), int(own["frozen"].iloc[0])
        size = f"{trained:,} parameters" + (f" beside {frozen:,} frozen ones" if frozen else "")
        sections.append(Section(f"{name}: {size}", [model_table(own)]))
    if runs:
        sections.append(Section("unlearn from end to end", [runs_table(runs)]))
    fitted = "Exponents p of c x^p, fitted to the last three points."
    sections.append(Section("As the work grows", [fitted, Picture("growth.png")]))
    for axis in dict.fromkeys(points["axis"]):
        sections.append(Section(f"Exponents in {axis}", [growth_table(points, axis)]))
    write_sections(path, "Benchmarks", sections, origin)
    return sections
