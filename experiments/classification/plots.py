"""The pictures of a comparison of methods with retraining."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.shared.records import RecordsByKey, of_kind
from experiments.shared.report import (
    ORIGINAL,
    OTHER_SEED,
    REFERENCES,
    RETRAIN,
    Frame,
    Look,
    grid,
    plain_numbers,
    save,
)

Looks = Mapping[str, Look]


def front(points: np.ndarray) -> np.ndarray:
    """The points [n, 2] that no other beats in both coordinates, by falling first coordinate."""
    points = points[np.lexsort((-points[:, 1], -points[:, 0]))]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(points[:-1, 1])])
    return points[points[:, 1] > best_before]


def hypervolume(points: np.ndarray, limit: float) -> float:
    """Share of [0, limit] x [0, 100] that the points [n, 2] dominate; higher is better.

    The first coordinate is a forget error and the limit Retrain's: what lies beyond earns nothing.
    """
    points = points[np.all(np.isfinite(points), 1)]
    if not len(points) or limit <= 0:
        return 0.0
    x, y = front(np.stack([np.minimum(points[:, 0], limit), points[:, 1]], 1)).T
    return float(np.sum(x * np.diff(y, prepend=0))) / (100 * limit)


def plot_front(path: pathlib.Path, runs: Frame, trials: Frame, looks: Looks, column: str, label: str) -> None:
    """Forget error and utility of every trial and every tuned method, a panel for each task."""
    tasks = list(runs["task"].unique())
    figure, axes = grid(len(tasks), 3, 5.6, 4.4)
    for axis, task in zip(axes, tasks, strict=True):
        means = runs[runs["task"] == task].groupby("method", sort=False)[["UA", column]].mean()
        for method, look in looks.items():
            if len(trials):
                tried = trials[(trials["task"] == task) & (trials["method"] == method)]
                points = tried[["UA", column]].dropna().to_numpy()
                axis.scatter(*points.T, s=12, alpha=0.5, **look.mark)
                if len(points):
                    axis.plot(*front(points).T, color=look.color, alpha=0.35, linewidth=1)
            retrained = method in (RETRAIN, OTHER_SEED)
            size = {"s": 320, "zorder": 6} if retrained else {"s": 75, "zorder": 4}
            axis.scatter(*means.loc[method], label=method, edgecolors="white", **size, **look.mark)
        error, utility = means.loc[RETRAIN]
        axis.set(title=f"forget {task}", xlabel="forget error UA (%)", ylabel=f"{label} (%)")
        # What lies far beyond Retrain, or far below it, would hide the rest.
        axis.set_xlim(-3, 103 if error > 40 else 3 * error + 10)
        axis.set_ylim(max(means[column].min(), utility - 25) - 2, 101)
        axis.grid(alpha=0.3)
    save(figure, path, legend=6)


def plot_attack(path: pathlib.Path, attacked: Frame, runs: Frame, looks: Looks) -> None:
    """Gap and the likelihood-ratio attack's AUC of every method, a panel for each task."""
    tasks = list(attacked["task"].unique())
    gaps = runs.pivot_table(index="method", columns="task", values="gap", sort=False)
    figure, axes = grid(len(tasks), 3, 5.6, 4.0)
    for axis, task in zip(axes, tasks, strict=True):
        found = attacked[attacked["task"] == task].set_index("method")["auc"]
        for method in [method for method in looks if method in found]:
            size = {"s": 320, "zorder": 6} if method == RETRAIN else {"s": 75, "zorder": 4}
            mark = looks[method].mark
            axis.scatter(
                gaps.loc[method, task], found[method], label=method, edgecolors="white", **size, **mark
            )
        axis.set(title=f"forget {task}", xlabel="gap to Retrain (points)", ylabel="AUC of the attack")
        axis.set_ylim(min(0.45, found.min() - 0.03), 1.03)
        axis.grid(alpha=0.3)
    save(figure, path, legend=6)


def plot_histories(path: pathlib.Path, records: RecordsByKey, looks: Looks) -> None:
    """Multiplier and losses along the first run of every method that has both, a row for each task."""
    first = {}
    for record in of_kind(records, "run"):
        _, task, method, *_ = record["key"]
        if "history" in record and method in looks:
            first.setdefault((task, method), record["history"])
    tasks = list(dict.fromkeys(task for task, _ in first))
    panels = {"forget_loss": "forget loss", "retain_loss": "retain loss", "multiplier": "multiplier"}
    figure, axes = grid(3 * len(tasks), 3, 5.2, 3.0)
    for axis, (task, key) in zip(axes, [(t, k) for t in tasks for k in panels], strict=True):
        for method, look in looks.items():
            history = first.get((task, method))
            values = np.array(history[key] if history else [], float)
            if len(values) and np.all(np.isfinite(values)) and np.all(values >= 0):
                share = np.linspace(0, 1, len(values))
                axis.plot(share, values, look.line, color=look.color, label=method, linewidth=1.3)
        axis.set(title=f"forget {task}: {panels[key]}", xlabel="share of the run")
        axis.grid(alpha=0.3)
        if key == "multiplier":
            axis.set_yscale("symlog", linthresh=0.1)
            axis.set_ylim(0, 1e3)
        else:
            axis.set_yscale("log")
            plain_numbers(axis.yaxis)
    save(figure, path, legend=6)


def plot_relearning(path: pathlib.Path, records: RecordsByKey, looks: Looks) -> None:
    """Forget accuracy along the two relearning attacks, a row for each task."""
    attacked = [record for record in of_kind(records, "run") if "relearning on few" in record]
    tasks = list(dict.fromkeys(record["key"][1] for record in attacked))
    figure, axes = grid(2 * len(tasks), 2, 7, 3.2)
    kinds = ("relearning on retain", "relearning on few")
    for axis, (task, kind) in zip(axes, [(t, k) for t in tasks for k in kinds], strict=True):
        for record in attacked:
            _, of_task, method, *_ = record["key"]
            if of_task == task and method in looks:
                look = looks[method]
                width = {"linewidth": 2.5, "zorder": 5} if method in REFERENCES else {"linewidth": 1}
                steps = np.linspace(0, 100, len(record[kind]))
                axis.plot(steps, record[kind], look.line, label=method, markersize=4, **width, **look.mark)
        axis.set(title=f"forget {task}: {kind}", xlabel="% of the attack's steps")
        axis.set(ylabel="forget accuracy (%)")
        axis.grid(alpha=0.3)
    save(figure, path, legend=6)


def plot_classes(
    path: pathlib.Path, runs: Frame, records: RecordsByKey, tasks: Sequence[str], looks: Looks
) -> None:
    """Bars of each class's test accuracy less Retrain's, for the methods nearest to Retrain."""
    figure, axes = grid(len(tasks), 1, 12, 3.4)

    def of_classes(task, method):
        found = [record for record in of_kind(records, "run") if record["key"][1:3] == [task, method]]
        return np.mean([list(record["per_class"].values()) for record in found if "per_class" in record], 0)

    for axis, task in zip(axes, tasks, strict=True):
        gaps = runs[(runs["task"] == task) & runs["method"].isin(looks)].groupby("method")["gap"].mean()
        ranked = list(gaps.drop(list(REFERENCES), errors="ignore").sort_values().index)
        eupmu = [method for method in ranked if looks[method].stands_out][:2]
        shown = [ORIGINAL, *dict.fromkeys([*ranked[:5], *eupmu])]
        retrain = of_classes(task, RETRAIN)
        width = 0.8 / len(shown)
        for i, method in enumerate(shown):
            place = np.arange(len(retrain)) + width * (i + 0.5) - 0.4
            change = of_classes(task, method) - retrain
            axis.bar(place, change, width, color=looks[method].color, label=method)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=10)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(title=f"forget {task}", xlabel="class", ylabel="points")
        axis.set_xticks(range(len(retrain)), labels_of_classes(records))
        axis.grid(alpha=0.3, axis="y")
    save(figure, path, legend=6)


def labels_of_classes(records: RecordsByKey) -> list[str]:
    return list(next(iter(of_kind(records, "run")))["per_class"])


def plot_costs(path: pathlib.Path, costs: Frame, looks: Looks) -> None:
    panels = {
        "seconds": ("seconds of a run", 1),
        "gradients": ("gradients per step", 1),
        "peak_bytes": ("peak MB of a step", 1e-6),
    }
    figure, axes = grid(3, 3, 5, 0.25 * len(costs) + 1.2)
    colours = [looks[method].color for method in costs.index[::-1]]
    for axis, (column, (title, unit)) in zip(axes, panels.items(), strict=True):
        axis.barh(costs.index[::-1], costs[column][::-1] * unit, color=colours)
        axis.set(title=title)
        axis.grid(alpha=0.3, axis="x")
        if axis is not axes[0]:
            axis.set_yticklabels([])
    save(figure, path)
