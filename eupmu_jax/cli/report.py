"""One page of a run: what it was, how it went, what came out."""

import json
import os
import pathlib
from typing import Any

import numpy as np

from eupmu_jax.cli import page
from eupmu_jax.run.files import write_whole
from eupmu_jax.run.promise import Promise, verdict


def write(folder: str | os.PathLike) -> pathlib.Path:
    """Draws curves.png and writes report.html into a folder of `unlearn`; ValueError if it is none."""
    try:
        return _written(pathlib.Path(folder))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(
            f"{folder}: the files of this run were edited and make no sense: {error!r}"
        ) from error


def _written(folder: pathlib.Path) -> pathlib.Path:
    run, steps, evaluations = read(folder)
    draw(folder / "curves.png", run["constraint"], steps, evaluations)
    parts = [page.paragraph(sentence(run, steps, evaluations))]
    if promise := read_promise(folder):
        parts.append(page.paragraph(verdict(promise)))
    parts.append(page.picture(folder / "curves.png"))
    if (path := folder / "evaluation.json").exists():
        for name, sets in json.loads(path.read_text()).items():
            parts += [page.heading(name), page.table(sets.items())]
    if evaluations:
        numbers = lambda line: {name: value for name, value in line.items() if is_number(value)}
        rows = [
            (f"{line['step']}", {k: v for k, v in numbers(line).items() if k != "step"})
            for line in evaluations
        ]
        parts += [page.heading("Evaluations, by steps done"), page.table(rows)]
    for name in ("config.json", "run.json"):
        if (path := folder / name).exists():
            parts += [page.heading(name), page.preformatted(path.read_text())]
    written = folder / "report.html"
    write_whole(written, page.page(folder.resolve().name, parts))
    return written


def read(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray], list[dict[str, Any]]]:
    """run.json, and of metrics.jsonl the steps by name ([T] or [T, K]) and the evaluations."""
    try:
        run = json.loads((folder / "run.json").read_text())
        texts = (folder / "metrics.jsonl").read_text().splitlines()
        run = {"constraint": run["constraint"], "steps": run["steps"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not the folder of a run of unlearn: {error}") from error
    lines = []
    for text in texts:
        try:
            lines.append(json.loads(text))
        except ValueError:  # being written just now
            break
    steps = [line for line in lines if "evaluation" not in line]
    if not steps:
        raise ValueError(f"{folder}: the run has not done any step yet")
    names = [name for name in steps[0] if name != "step"]
    evaluations = [line["evaluation"] for line in lines if "evaluation" in line]
    return run, {name: np.array([line[name] for line in steps], float) for name in names}, evaluations


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


def read_promise(folder: pathlib.Path) -> Promise | None:
    """promise.json of a finished run; None where there is none."""
    path = folder / "promise.json"
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        for name, value in values.items():
            values[name] = np.asarray(value) if isinstance(value, float | list) else value
        return Promise(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the promise of a run: {error}") from error


def sentence(run: dict[str, Any], steps: dict[str, np.ndarray], evaluations: list[dict[str, Any]]) -> str:
    """How far the run is, and what a reader must know of it."""
    done = len(steps["forget_loss"])
    parts = [f"{done} of {run['steps']} steps."]
    if evaluations and evaluations[-1].get("stopped"):
        parts.append(f"Ended early: {evaluations[-1]['stopped']}.")
    if skipped := int(steps["skipped_steps"][-1]):
        parts.append(f"{skipped} steps were skipped, for a loss or a gradient was not finite.")
    if np.any(steps["infeasible"][-1]):
        parts.append("The budget looks infeasible: fine-tuning alone would not hold it.")
    return " ".join(parts)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_text(models: dict[str, dict[str, dict[str, float]]]) -> str:
    """Models x sets x scores, a line each."""
    lines = []
    for model, sets in models.items():
        for name, row in sets.items():
            numbers = "  ".join(f"{score} {value:.4g}" for score, value in row.items())
            lines.append(f"{model}: {name:7} {numbers}")
    return "\n".join(lines)
