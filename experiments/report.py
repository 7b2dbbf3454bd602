"""A run's folder: its configuration and results as JSON and CSV, its tables and its pictures."""

import csv
import dataclasses
import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
from typing import Any

import jax
import matplotlib
import numpy as np
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLUMNS = ["UA", "RA", "TA", "MIA", "gap", "seconds"]


def new_run_dir(parent: pathlib.Path, name: str) -> pathlib.Path:
    """A new folder, named after the time; never one that exists."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        path = parent / f"{name}-{stamp}{f'-{attempt}' if attempt else ''}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"no free name left for {name}-{stamp} in {parent}")


def provenance(config: Any) -> dict[str, Any]:
    """What it takes to run this again: the resolved config, versions, device, commit and date."""
    packages = ["eupmu_jax", "jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn"]
    describe = ["git", "describe", "--always", "--dirty"]
    here = pathlib.Path(__file__).parent
    try:
        commit = subprocess.run(describe, cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        commit = "unknown"
    return {
        "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "commit": commit.strip(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, pathlib.Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(path: pathlib.Path, results: dict[str, Any]) -> None:
    """results.json (null for what is not finite), and its rows as results.csv."""
    (path / "results.json").write_text(json.dumps(_plain(results), indent=2, allow_nan=False) + "\n")
    with (path / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "method", *COLUMNS, "forget_loss", "retain_loss"])
        for task, result in results["tasks"].items():
            for method, row in result["methods"].items():
                cells = [row[name] for name in [*COLUMNS, "forget_loss", "retain_loss"]]
                writer.writerow([task, method, *(f"{cell:.6g}" for cell in cells)])


def table(title: str, methods: dict[str, dict[str, float]]) -> Table:
    """A result table for the terminal."""
    out = Table(title=title, title_justify="left")
    out.add_column("method")
    for name in COLUMNS:
        out.add_column(name, justify="right")
    for method, row in methods.items():
        cells = (f"{row[name]:.2f}" if name == "gap" else f"{row[name]:.1f}" for name in COLUMNS)
        out.add_row(method, *cells)
    return out


def colours(methods) -> dict[str, Any]:
    """One colour a method, the same in every picture; the two references are black."""
    references = {"Original": "black", "Retrain": "black"}
    others = [method for method in methods if method not in references]
    return references | {method: plt.get_cmap("tab10")(i % 10) for i, method in enumerate(others)}


def plain_numbers(*axes) -> None:
    """1, 2, 5 in place of powers of ten on logarithmic axes."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def running_mean(series: np.ndarray, width: int) -> np.ndarray:
    """Means over a centred window that shrinks at the ends."""
    window = np.ones(width)
    return np.convolve(series, window, "same") / np.convolve(np.ones_like(series), window, "same")


def plot_histories(path: pathlib.Path, histories: dict[str, dict[str, dict[str, np.ndarray]]]) -> None:
    """Losses and multiplier over steps, a row for each task."""
    panels = {"forget_loss": "forget loss", "retain_loss": "retain loss", "multiplier": "multiplier"}
    figure, axes = plt.subplots(
        len(histories), 3, figsize=(14, 3.6 * len(histories)), squeeze=False, layout="constrained"
    )
    for row, (task, methods) in zip(axes, histories.items(), strict=True):
        palette = colours(methods)
        for axis, (key, label) in zip(row, panels.items(), strict=True):
            for method, history in methods.items():
                smooth = running_mean(history[key], max(1, len(history[key]) // 40))
                style = "--" if method.startswith("constant") else "-"
                axis.plot(smooth, style, color=palette[method], label=method, linewidth=1.5)
            axis.set(xlabel="step", title=f"forget {task}: {label} of the batch")
            axis.grid(alpha=0.3)
            if key == "multiplier":
                axis.set(title=f"forget {task}: multiplier", ylabel="of losses; EUPMU: of log losses")
                axis.set(yscale="symlog", ylim=(0, None))
            else:
                axis.set_yscale("log")
                plain_numbers(axis.yaxis)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path / "histories.png", dpi=120)
    plt.close(figure)


def plot_trade_off(path: pathlib.Path, tasks: dict[str, Any]) -> None:
    """Final retain loss against final forget loss over the whole sets, Retrain as a star."""
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(6.5 * len(tasks), 5), squeeze=False, layout="constrained"
    )
    for axis, (task, result) in zip(axes[0], tasks.items(), strict=True):
        methods = result["methods"]
        points = {method: (row["forget_loss"], row["retain_loss"]) for method, row in methods.items()}
        constant = [method for method in methods if method.startswith("constant")]
        axis.plot(*zip(*map(points.get, constant), strict=True), "k--", alpha=0.4, linewidth=1)
        palette = colours(methods)
        for method in methods:
            default = ("o" if method in constant else "D", 60)
            marker, size = {"Retrain": ("*", 260), "Original": ("X", 90)}.get(method, default)
            style = {"color": palette[method], "marker": marker, "s": size, "zorder": 3}
            axis.scatter(*points[method], label=method, **style)
        axis.set(
            xscale="log",
            yscale="log",
            title=f"forget {task}",
            xlabel="forget loss, to the wrong labels (left: more is forgotten)",
            ylabel="retain loss (down: more is kept)",
        )
        plain_numbers(axis.xaxis, axis.yaxis)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path / "trade_off.png", dpi=120)
    plt.close(figure)
