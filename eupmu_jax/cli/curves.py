"""The picture of a run: losses, multiplier and accuracies, step by step."""

import pathlib
from typing import Any

import numpy as np


def draw(
    path: pathlib.Path,
    constraint: dict[str, Any],
    steps: dict[str, np.ndarray],
    evaluations: list[dict[str, Any]],
) -> None:
    """Both losses, with what the retain loss may be, the multiplier, and accuracies that were evaluated."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 6.5), layout="constrained")
    forget, retain, multiplier, accuracy = figure.subplots(2, 2).flat
    count = np.arange(1, len(steps["forget_loss"]) + 1)
    window = max(1, len(count) // 100)
    for axis, name in ((forget, "forget_loss"), (retain, "retain_loss"), (multiplier, "multiplier")):
        smooth = window > 1 and axis is not multiplier
        for k, values in enumerate(np.reshape(steps[name], (len(count), -1)).T):
            axis.plot(count, values, color=f"C{k}", alpha=0.25 if smooth else 1, linewidth=0.8)
            if smooth:
                means = np.convolve(values, np.ones(window) / window, mode="valid")
                label = None if k else f"mean of {window} steps"
                axis.plot(count[window - 1 :], means, color=f"C{k}", label=label)
        axis.set(xlabel="step", ylabel=name.replace("_", " "))
    has_budget = constraint["type"] == "Budget"
    if has_budget and constraint["baseline"] is not None:
        bounds = np.ravel(np.asarray(constraint["baseline"]) + np.asarray(constraint["total"]))
        for k, bound in enumerate(bounds):
            label = None if k else "baseline + budget"
            retain.axhline(bound, color=f"C{k}", linestyle=":", label=label)
    if has_budget and np.all(steps["multiplier"] > 0):
        multiplier.set_yscale("log")
    names = [name for name in (evaluations[0] if evaluations else {}) if name.endswith("accuracy")]
    for name in names:
        points = [(line["step"], line[name]) for line in evaluations if name in line]
        accuracy.plot(
            *zip(*points, strict=True), ".-", label=name.removesuffix("accuracy").strip("_ ") or name
        )
    accuracy.set(xlabel="step", ylabel="accuracy")
    accuracy.set_visible(bool(names))
    for axis in (forget, retain, multiplier, accuracy):
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
