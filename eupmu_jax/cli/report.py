"""One page of a run: what it was, how it went, what came out."""

import base64
import html
import json
import os
import pathlib
from typing import Any

import numpy as np

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto}"""


def write(folder: str | os.PathLike) -> pathlib.Path:
    """Draws curves.png and writes report.html into a folder of `unlearn`; ValueError if it is none."""
    folder = pathlib.Path(folder)
    run, steps, evaluations = read(folder)
    draw(folder / "curves.png", run["settings"], steps, evaluations)
    image = base64.b64encode((folder / "curves.png").read_bytes()).decode()
    parts = [sentence(run, steps, evaluations), f'<img alt="curves" src="data:image/png;base64,{image}">']
    if (path := folder / "evaluation.json").exists():
        for name, sets in json.loads(path.read_text()).items():
            parts.append(f"<h2>{html.escape(name)}</h2>{table(sets)}")
    if evaluations:
        kept = {
            f"{line['step']}": {k: v for k, v in line.items() if is_number(v) and k != "step"}
            for line in evaluations
        }
        parts.append(f"<h2>Evaluations, by steps done</h2>{table(kept)}")
    for name in ("config.json", "run.json"):
        if (path := folder / name).exists():
            parts.append(f"<h2>{name}</h2><pre>{html.escape(path.read_text())}</pre>")
    title = html.escape(folder.resolve().name)
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    )
    page = folder / "report.html"
    page.write_text(f"{head}<h1>{title}</h1>{''.join(parts)}</html>\n")
    return page


def read(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray], list[dict[str, Any]]]:
    """run.json, and of metrics.jsonl the steps by name ([T] or [T, K]) and the evaluations."""
    try:
        run = json.loads((folder / "run.json").read_text())
        texts = (folder / "metrics.jsonl").read_text().splitlines()
        run = {"settings": run["settings"], "steps": run["steps"]}
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


def draw(path: pathlib.Path, settings: Any, steps: dict[str, np.ndarray], evaluations: Any) -> None:
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
    if settings.get("budget") is not None and settings.get("retain_baseline") is not None:
        bounds = np.ravel(np.asarray(settings["retain_baseline"]) + np.asarray(settings["budget"]))
        for k, bound in enumerate(bounds):
            label = None if k else "baseline + budget"
            retain.axhline(bound, color=f"C{k}", linestyle=":", label=label)
    if settings.get("budget") is not None and np.all(steps["multiplier"] > 0):
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


def sentence(run: dict[str, Any], steps: dict[str, np.ndarray], evaluations: Any) -> str:
    """How far the run is, and what a reader must know of it."""
    done = len(steps["forget_loss"])
    parts = [f"{done} of {run['steps']} steps."]
    if evaluations and evaluations[-1].get("stopped"):
        parts.append(f"Ended early: {evaluations[-1]['stopped']}.")
    if skipped := int(steps["skipped_steps"][-1]):
        parts.append(f"{skipped} steps were skipped, for a loss or a gradient was not finite.")
    if np.any(steps["infeasible"][-1]):
        parts.append("The budget looks infeasible: fine-tuning alone would not hold it.")
    return f"<p>{html.escape(' '.join(parts))}</p>"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of named numbers as HTML."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cell = lambda row, name: f"{row[name]:.4g}" if name in row else ""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in ["", *names])]
    for label, row in rows.items():
        lines.append(
            f"<td>{html.escape(label)}</td>" + "".join(f"<td>{cell(row, name)}</td>" for name in names)
        )
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def as_text(models: dict[str, dict[str, dict[str, float]]]) -> str:
    """Models x sets x scores, a line each."""
    lines = []
    for model, sets in models.items():
        for name, row in sets.items():
            numbers = "  ".join(f"{score} {value:.4g}" for score, value in row.items())
            lines.append(f"{model}: {name:7} {numbers}")
    return "\n".join(lines)
