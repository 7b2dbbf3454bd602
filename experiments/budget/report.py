"""The tables of the budget study."""

import pathlib
from typing import Any

import numpy as np
import pandas as pd

from eupmu_jax.run.loop import SKIPPED_IN_A_ROW
from eupmu_jax.run.promise import REPAIR_ROWS
from experiments.budget import convergence, plots
from experiments.budget.controllers import CONTROLLERS, EUPMU
from experiments.budget.study import (
    FINE_TUNING,
    FORGETTING,
    Cell,
    Scale,
    comparison_cells,
    efficiency_cells,
    grid_cells,
    weight_names,
)
from experiments.budget.utilities import ORIGINAL, before_unlearning
from experiments.shared.records import Record, RecordsByKey, of_kind
from experiments.shared.report import Frame, Origin, Picture, Section, write_csv
from experiments.shared.report import write_report as write_sections

NOTHING_LEFT = 0.01
"""Below this share of what it was the forget loss has nothing more to buy with a budget."""
LAST = 5
"""Of a run's stored means, so many count as its end: about a tenth of the steps."""


def runs_frame(runs: dict[tuple[Any, ...], Record]) -> Frame:
    """A line for each run: its cell, what it spent, and what fine-tuning and forgetting alone did there."""
    lines = []
    for (name, *cell), record in runs.items():
        cell = Cell(*cell)
        rise = record["retain_loss"] - record["retain_loss before"]
        line = {"controller": name, **cell._asdict(), "forget_loss": record["forget_loss"], "rise": rise}
        tuned = runs.get((FINE_TUNING, *cell._replace(budget=0.0)))
        if cell.budget and tuned:
            floor = max(
                tuned["retain_loss"] - tuned["retain_loss before"], float(np.mean(tuned["rises"][-LAST:]))
            )
            line |= {"spent": rise / cell.budget, "feasible": bool(floor <= cell.budget)}
            line["fine-tuning"] = floor / cell.budget
            line["flagged"] = record.get("infeasible")
            line["skipped_steps"] = record.get("skipped_steps")
            if "holds" in record:
                before = record["retain_loss unrepaired"] - record["retain_loss before"]
                line["unrepaired"] = before / cell.budget
                line["unrepaired forget_loss"] = record["forget_loss unrepaired"]
                line |= {key: record[key] for key in ("repair_steps", "holds", "measured_on")}
            if only := runs.get((FORGETTING, *cell._replace(budget=0.0))):
                # Not <=: a run that diverged has no finite loss.
                exceeds = not only["retain_loss"] - only["retain_loss before"] <= cell.budget
                is_left = record["forget_loss"] > NOTHING_LEFT * record["forget_loss before"]
                line["spendable"] = exceeds and is_left
        lines.append(line)
    return pd.DataFrame(lines)


def chosen(runs: Frame, name: str, cells: list[Cell]) -> Frame:
    """The runs of one controller on these cells."""
    return runs[runs["controller"] == name].merge(pd.DataFrame(cells), on=list(Cell._fields))


def summary(runs: Frame) -> dict[str, Any]:
    """Adherence and spending of the feasible ones among some runs."""
    feasible = runs[runs["feasible"].astype(bool)]
    spent = feasible["spent"]
    if not len(spent):
        return {"feasible runs": "0"}
    quartiles = " to ".join(f"{value:.2f}" for value in spent.quantile([0.25, 0.75]))
    found = {
        "feasible runs": f"{len(spent)}",
        "within 100%": f"{100 * (spent <= 1).mean():.1f}%",
        "within 105%": f"{100 * (spent <= 1.05).mean():.1f}%",
        "median spent": f"{spent.median():.3f}",
        "at least 95%": f"{100 * (spent >= 0.95).mean():.0f}%",
        "quartiles": quartiles,
        "5% to 95%": " to ".join(f"{value:.2f}" for value in spent.quantile([0.05, 0.95])),
    }
    if "spendable" in feasible and feasible["spendable"].notna().all():
        could = spent[feasible["spendable"].astype(bool)]
        found |= {
            "could spend it": f"{len(could)}",
            "median of these": f"{could.median():.3f}",
            "at least 95% of these": f"{100 * (could >= 0.95).mean():.0f}%",
        }
    if "holds" in feasible and feasible["holds"].notna().all():
        found["before the repair"] = f"{100 * (feasible['unrepaired'] <= 1).mean():.0f}%"
        found["repaired"] = f"{(feasible['repair_steps'] > 0).sum()}"
        found["most steps"] = f"{feasible['repair_steps'].max():.0f}"
        found["the original"] = f"{(~feasible['holds'].astype(bool)).sum()}"
    return found


def extra_flops(runs: Frame, steps: int) -> float:
    """What measuring and repairing adds to a run's FLOPs, the mean of some runs.

    In passes of one row forward: a measurement is one for each row, a gradient three, a step of the run
    three for each row of both batches. The measurement of R_0 is counted, too.
    """
    repairs = runs["repair_steps"]
    added = (2 + repairs) * runs["measured_on"] + 3 * REPAIR_ROWS * repairs
    return float((added / (3 * 2 * runs["batch_size"] * steps)).mean())


def base_batch(runs: Frame) -> int:
    """The batch size of most runs."""
    return int(runs["batch_size"].mode().iloc[0])


def by_group(runs: Frame) -> Frame:
    """The summary of the whole grid and of its slices."""
    rows = {"all": summary(runs)}
    full = runs[runs["batch_size"] == 64]
    for column in ("task", "inner", "schedule", "budget"):
        for value, group in full.groupby(column, sort=False):
            rows[f"{column} {value}"] = summary(group)
    same = runs[(runs["budget"] == 0.1) & (runs["inner"] == "momentum") & (runs["schedule"] == "constant")]
    same = same[same["rate"].isin([0.003, 0.01, 0.03])]
    for value, group in same.groupby("batch_size"):
        rows[f"batch size {value}"] = summary(group)
    for (inner, rate), group in full.groupby(["inner", "rate"], sort=False):
        rows[f"{inner} {rate:g}"] = summary(group)
    return pd.DataFrame(rows).T.fillna("-")


def controllers_table(runs: Frame, scale: Scale) -> Frame:
    """Every controller on the same cells; forget losses as a ratio to EUPMU's, geometric mean and median."""
    cells = comparison_cells(scale)
    ours = chosen(runs, EUPMU, cells).set_index(list(Cell._fields))
    rows = {}
    for name in CONTROLLERS:
        part = chosen(runs, name, cells)
        ratio = part.set_index(list(Cell._fields))["forget_loss"] / ours["forget_loss"]
        ratio = ratio[ours["feasible"].astype(bool)].replace([0, np.inf], np.nan).dropna()
        ratios = {
            "forget loss / EUPMU": f"{np.exp(np.log(ratio).mean()):.2f}",
            "median": f"{ratio.median():.2f}",
        }
        rows[name] = summary(part) | ratios
    return pd.DataFrame(rows).T.drop(columns="feasible runs", errors="ignore").fillna("-")


def best_constant(front: Frame, rise: float) -> float:
    """Forget loss of constant weights at that rise of the retain loss.

    Between neighbours on the front (what no other weight beats in both) by a line; NaN beyond its ends.
    """
    front = front.sort_values(["rise", "forget_loss"])
    front = front[front["forget_loss"] < front["forget_loss"].shift().cummin().fillna(np.inf)]
    if not front["rise"].min() <= rise <= front["rise"].max():
        return float("nan")
    return float(np.interp(rise, front["rise"], front["forget_loss"]))


def efficiency_frame(runs: Frame, scale: Scale) -> Frame:
    """For each of the named cells: EUPMU's forget loss and that of the best constant weight."""
    weights = runs[runs["controller"].isin(weight_names(scale))]
    lines = []
    for cell in efficiency_cells(scale):
        ours = chosen(runs, EUPMU, [cell]).iloc[0]
        swept = weights.merge(pd.DataFrame([cell._replace(budget=0.0)]), on=list(Cell._fields))
        swept = swept[np.isfinite(swept["forget_loss"]) & np.isfinite(swept["rise"])]
        constant = best_constant(swept, ours["rise"])
        within = swept[swept["rise"] <= cell.budget]["forget_loss"].min()
        lines.append(
            {
                "cell": f"{cell.task}, {cell.inner} {cell.rate:g}",
                "seed": cell.seed,
                "spent": ours["spent"],
                "EUPMU": ours["forget_loss"],
                "constant, same rise": constant,
                "best constant within budget": within,
                "ratio": ours["forget_loss"] / constant,
            }
        )
    return pd.DataFrame(lines)


def labelled(runs: Frame, each: int = 30) -> Frame:
    """So many feasible and so many infeasible runs, drawn evenly over the grid.

    Where fine-tuning alone ends within a quarter of the budget's end, its last batches decide: left out.
    """
    runs = runs[~runs["fine-tuning"].between(0.75, 1.25)]
    evenly = lambda part: part.iloc[np.unique(np.linspace(0, len(part) - 1, each).round().astype(int))]
    parts = [runs[runs["feasible"] == value] for value in (True, False)]
    return pd.concat([evenly(part) for part in parts if len(part)])


def detection_table(runs: Frame) -> Frame:
    """Feasible by fine-tuning against what EUPMU says at the end of its run."""
    said = runs["flagged"].map({True: "flagged", False: "not flagged"})
    counts = pd.crosstab(
        runs["feasible"].map({True: "feasible", False: "infeasible"}),
        said.mask(runs["skipped_steps"] >= SKIPPED_IN_A_ROW, "steps skipped"),
    )
    return counts.astype(str)


def elsewhere_tables(records: RecordsByKey) -> Frame:
    """The summary of each other data set and network."""
    found: dict[str, dict[tuple[Any, ...], Record]] = {}
    for record in of_kind(records, "elsewhere"):
        _, place, *key = record["key"]
        found.setdefault(place, {})[tuple(key)] = record
    ours = {place: runs_frame(runs) for place, runs in found.items()}
    rows = {place: summary(runs[runs["controller"] == EUPMU]) for place, runs in ours.items()}
    return pd.DataFrame(rows).T.fillna("-")


def utilities_tables(records: RecordsByKey, budget: float) -> Frame:
    """What forgetting one class cost the others, per variant; means over the trained models."""
    found = of_kind(records, "utilities")
    before = before_unlearning(found)
    lines = []
    for record in found:
        _, name, rate, seed = record["key"]
        if name == ORIGINAL:
            continue
        rise = {
            part: np.subtract(record[f"{part} loss"], before[seed][f"{part} loss"])
            for part in ("train", "held_out", "test")
        }
        change = np.subtract(record["test accuracy"], before[seed]["test accuracy"])
        lines.append(
            {
                "variant": f"{name}, rate {rate:g}",
                "forget loss": record["forget_loss"],
                "forget accuracy": record["forget_accuracy"],
                "worst training rise / budget": rise["train"].max() / budget,
                "worst held-out rise / budget": rise["held_out"].max() / budget,
                "worst test rise / budget": rise["test"].max() / budget,
                "worst change of test accuracy": change.min(),
                "mean change of test accuracy": change.mean(),
                "FLOPs / one budget": record["flops"],
                "repair steps": record.get("repair_steps", np.nan),
            }
        )
    frame: Frame = pd.DataFrame(lines).groupby("variant", sort=False).mean()
    frame["FLOPs / one budget"] /= frame["FLOPs / one budget"].iloc[0]
    return frame


def write_report(
    path: pathlib.Path,
    records: RecordsByKey,
    scale: Scale,
    budget: float,
    curves: Frame,
    origin: Origin,
) -> list[Section]:
    """All tables and pictures of a finished study; returns the sections to show first."""
    runs = runs_frame({tuple(record["key"][1:]): record for record in of_kind(records, "run")})
    grid = chosen(runs, EUPMU, grid_cells(scale))
    efficiency = efficiency_frame(runs, scale)
    write_csv(path / "runs.csv", runs, origin)
    plots.plot_spending(path / "spending.png", grid)
    plots.plot_controllers(path / "controllers.png", runs, comparison_cells(scale))
    plots.plot_fronts(path / "fronts.png", runs, scale)
    plots.plot_before_and_after(path / "before_and_after.png", records, scale)
    plots.plot_utilities(path / "utilities.png", records, budget)
    convergence.plot(path / "convergence.png", curves)
    whole = summary(grid)
    ours = grid[grid["feasible"].astype(bool)]
    within = efficiency.groupby("cell", sort=False)["ratio"].mean()
    flops = extra_flops(ours[ours["batch_size"] == base_batch(ours)], origin["steps"])
    figures = {
        "kept": ("all", whole.get("within 100%", "-"), f"of {len(ours)} feasible runs measured within 100%"),
        "spent": (
            ">= 0.97",
            f"{whole.get('median spent', '-')} ({whole.get('median of these', '-')})",
            "median share of the budget (of those that had something to spend it on)",
        ),
        "spent by most": (
            ">= 80%",
            f"{whole.get('at least 95%', '-')} ({whole.get('at least 95% of these', '-')})",
            "of them spent at least 95% of it (likewise)",
        ),
        "efficiency": (
            "<= 1.00",
            f"{np.exp(np.log(within).mean()):.3f}, median {within.median():.3f}",
            f"forget loss / best of {len(scale.weights)} constant weights at the same "
            f"retain loss, geometric mean of {len(within)} cells ({(within <= 1).sum()} <= 1.00)",
        ),
        "cost": ("<= 8%", f"{100 * flops:.1f}%", "FLOPs more than without measuring and repairing"),
        "kept by the original": ("few", whole.get("the original", "-"), "runs, where nothing is forgotten"),
    }
    three = pd.DataFrame(figures, index=["goal", "measured", "what"]).T
    shown = efficiency.groupby("cell", sort=False).mean().drop(columns="seed").map(lambda x: f"{x:.3f}")
    utilities = utilities_tables(records, budget).map(lambda value: f"{value:.2f}")
    rates = convergence.rates(curves).map(lambda value: "-" if np.isnan(value) else f"{value:.2f}")
    rates.index = pd.Index([", ".join(names) for names in rates.index], name="exponent of t")
    sections = [
        Section("The promise", [three]),
        Section(
            "Spending", ["Rise of the full retain loss / budget.", by_group(grid), Picture("spending.png")]
        ),
        Section("Controllers", [controllers_table(runs, scale), Picture("controllers.png")]),
        Section("Efficiency", [shown, Picture("fronts.png")]),
        Section("Elsewhere", [elsewhere_tables(records)]),
        Section(
            "Infeasible budgets",
            [
                "Of all runs of the grid:",
                detection_table(grid),
                "Of 60, half of them clearly feasible and half clearly not:",
                detection_table(labelled(grid)),
            ],
        ),
        Section("Before and after", [Picture("before_and_after.png")]),
        Section("Utilities", [utilities, Picture("utilities.png")]),
        Section("Convergence", [rates, Picture("convergence.png")]),
    ]
    write_sections(path, "Budgets", sections, origin)
    return sections
