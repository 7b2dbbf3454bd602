"""What the classification study alone draws and measures of fronts."""

import pathlib

import numpy as np

from experiments.shared.comparison_plots import Looks, front
from experiments.shared.report import Frame, grid, save


def hypervolume(points: np.ndarray, limit: float) -> float:
    """Share of [0, limit] x [0, 100] that the points [n, 2] dominate; higher is better.

    The first coordinate is a forget error and the limit Retrain's: what lies beyond earns nothing.
    """
    points = points[np.all(np.isfinite(points), 1)]
    if not len(points) or limit <= 0:
        return 0.0
    x, y = front(np.stack([np.minimum(points[:, 0], limit), points[:, 1]], 1)).T
    return float(np.sum(x * np.diff(y, prepend=0))) / (100 * limit)


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
