"""The pictures of the budget study."""

import pathlib

import numpy as np
import pandas as pd

from experiments.budget.controllers import CONTROLLERS, EUPMU, RELEASED
from experiments.budget.study import Cell, Scale, efficiency_cells, weight_names
from experiments.budget.utilities import ORIGINAL, VARIANTS, before_unlearning
from experiments.shared.records import RecordsByKey, of_kind
from experiments.shared.report import Frame, grid, save

SHOWN = (-0.5, 2.5)
"""Shares of the budget beyond which a run is drawn at the edge."""


def plot_spending(path: pathlib.Path, runs: Frame) -> None:
    """Each feasible run's share of the budget against the learning rate, a panel for each inner optimiser."""
    feasible = runs[runs["feasible"].astype(bool) & (runs["batch_size"] == 64)]
    inners = list(feasible["inner"].unique())
    figure, axes = grid(len(inners), 2, 6, 3.6)
    for axis, inner in zip(axes, inners, strict=True):
        part = feasible[feasible["inner"] == inner]
        rates = sorted(part["rate"].unique())
        for i, (schedule, group) in enumerate(part.groupby("schedule", sort=False)):
            x = np.searchsorted(rates, group["rate"]) + 0.2 * (i - 1)
            jitter = np.random.default_rng(0).uniform(-0.06, 0.06, len(x))
            before = "before the repair" if i == 0 else None
            axis.scatter(
                x + jitter, group["unrepaired"].clip(*SHOWN), s=10, color="0.75", marker="x", label=before
            )
            axis.scatter(x + jitter, group["spent"].clip(*SHOWN), s=14, alpha=0.7, label=schedule)
        axis.axhspan(0, 1, color="tab:green", alpha=0.08)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axis.set(title=inner, xlabel="learning rate", ylabel="share of the budget spent")
        axis.set_ylim(SHOWN[0] - 0.1, SHOWN[1] + 0.1)
        axis.grid(alpha=0.3, axis="y")
    save(figure, path, legend=4)


def plot_controllers(path: pathlib.Path, runs: Frame, cells: list[Cell]) -> None:
    """The distribution of what each controller spent on the same feasible cells."""
    part = runs.merge(pd.DataFrame(cells), on=list(Cell._fields))
    part = part[part["feasible"].fillna(False).astype(bool)]
    names = [name for name in CONTROLLERS if name in set(part["controller"])]
    figure, (axis,) = grid(1, 1, 9, 0.38 * len(names) + 1.2)
    for i, name in enumerate(names):
        spent = part[part["controller"] == name]["spent"].clip(*SHOWN)
        jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(spent))
        axis.scatter(spent, i + jitter, s=14, alpha=0.6, color="C0" if name == EUPMU else "C7")
        axis.plot([spent.median()] * 2, [i - 0.35, i + 0.35], color="C3", linewidth=2)
    axis.axvspan(0, 1, color="tab:green", alpha=0.08)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="share of the budget spent (red: median; outliers at the edges)")
    axis.grid(alpha=0.3, axis="x")
    save(figure, path)


def plot_fronts(path: pathlib.Path, runs: Frame, scale: Scale) -> None:
    """Constant weights' forget and retain losses, and where EUPMU went without a sweep."""
    cells = efficiency_cells(scale)
    weights = runs[runs["controller"].isin(weight_names(scale))]
    problems = list(dict.fromkeys(cell._replace(seed=0) for cell in cells))
    figure, axes = grid(len(problems), 4, 4, 3.2)
    for axis, problem in zip(axes, problems, strict=True):
        for cell in cells:
            if cell._replace(seed=0) != problem:
                continue
            swept = weights.merge(pd.DataFrame([cell._replace(budget=0.0)]), on=list(Cell._fields))
            swept = swept.sort_values("rise")
            colour = f"C{cell.seed}"
            label = "constant weights" if cell.seed == cells[0].seed else None
            axis.plot(swept["rise"], swept["forget_loss"], "o-", ms=3, lw=0.8, color=colour, label=label)
            ours = runs[runs["controller"] == EUPMU].merge(pd.DataFrame([cell]), on=list(Cell._fields))
            label = EUPMU if cell.seed == cells[0].seed else None
            axis.scatter(
                ours["rise"], ours["forget_loss"], s=140, marker="*", color=colour, zorder=4, label=label
            )
        axis.axvline(problem.budget, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlim(-0.1, 4 * problem.budget)
        axis.set(title=f"{problem.task}, {problem.inner} {problem.rate:g}")
        axis.set(xlabel="rise of the retain loss (nats)", ylabel="forget loss (nats)")
        axis.grid(alpha=0.3)
    save(figure, path, legend=2)


def plot_before_and_after(path: pathlib.Path, records: RecordsByKey, scale: Scale) -> None:
    """Retain loss and multiplier with Muon, and with warm restarts, without a budget and with one."""
    runs = {tuple(record["key"][1:]): record for record in of_kind(records, "run")}
    shown = {}
    for (name, *fields), record in runs.items():
        cell = Cell(*fields)
        if name in (RELEASED, EUPMU) and cell.task in scale.tasks[:2]:
            what = "Muon" if cell.inner == "Muon" and cell.schedule == "constant" else None
            if cell.inner == "momentum" and cell.schedule == "warm restarts" and cell.rate == 0.01:
                what = "warm restarts"
            if what and (RELEASED, *cell) in runs and (EUPMU, *cell) in runs:
                shown.setdefault((what, cell.task), {})[name] = (cell, record)
    keys = sorted(shown, key=lambda key: key[0])
    figure, axes = grid(2 * len(keys), len(keys), 4.2, 2.7)
    for column, (what, task) in enumerate(keys):
        for name, (cell, record) in shown[what, task].items():
            steps = np.linspace(0, 100, len(record["rises"]))
            upper, lower = axes[column], axes[len(keys) + column]
            upper.plot(steps, record["rises"], label=name)
            lower.plot(steps, record["multipliers"], label=name)
            upper.axhline(cell.budget, color="black", linewidth=0.8, linestyle="--")
            upper.set(title=f"{what}: {task}, rate {cell.rate:g}", ylabel="rise of the retain loss")
            lower.set(yscale="log", xlabel="% of the run", ylabel="multiplier")
        top = 4 * scale.budgets[len(scale.budgets) // 2]
        axes[column].set_ylim(-0.15, top)
    for axis in axes:
        axis.grid(alpha=0.3)
    save(figure, path, legend=2)


def plot_utilities(path: pathlib.Path, records: RecordsByKey, budget: float) -> None:
    """For each class: the rise of its training and test loss, and its change of test accuracy."""
    found = of_kind(records, "utilities")
    before = before_unlearning(found)
    keyed = {tuple(record["key"][1:]): record for record in found}
    rates = sorted({rate for name, rate, _ in keyed if name != ORIGINAL})
    panels = [
        ("train loss", "training loss, rise / budget", budget),
        ("test loss", "test loss, rise / budget", budget),
        ("test accuracy", "test accuracy, change (points)", 1.0),
    ]
    figure, axes = grid(3 * len(rates), 3, 6, 3.4)
    for i, rate in enumerate(rates):
        for j, (what, label, unit) in enumerate(panels):
            axis = axes[3 * i + j]
            classes: list[int] = []
            for k, name in enumerate(VARIANTS):
                runs = {seed: keyed[name, rate, seed] for seed in before}
                changes = [np.subtract(run[what], before[seed][what]) / unit for seed, run in runs.items()]
                classes = next(iter(runs.values()))["classes"]
                x = np.arange(len(classes)) + 0.2 * (k - 1.5)
                axis.bar(x, np.mean(changes, 0), width=0.2, label=name)
            axis.set_xticks(range(len(classes)), map(str, classes))
            axis.set(xlabel="class", ylabel=label, title=f"rate {rate:g}")
            axis.axhline(0, color="black", linewidth=0.6)
            if unit != 1.0:
                axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
            axis.grid(alpha=0.3, axis="y")
    save(figure, path, legend=4)
