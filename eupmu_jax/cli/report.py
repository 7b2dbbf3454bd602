"""One page of a run, for whoever has to judge it: what was asked, on which data, what was measured."""

import json
import os
import pathlib
from typing import Any

import numpy as np

from eupmu_jax.cli import card, page
from eupmu_jax.cli.curves import draw
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
    config, promise = read_config(folder), read_promise(folder)
    scores = json.loads(path.read_text()) if (path := folder / "evaluation.json").exists() else {}
    is_finished = promise or run["constraint"]["type"] != "Budget" or not unfinished(run, steps, evaluations)
    lead = verdict(promise) if is_finished else card.UNFINISHED
    parts = [page.emphasised(lead), page.paragraph(sentence(run, steps, evaluations))]
    parts += [page.heading("What was asked"), page.table(card.asked(run, config.get("config", {})))]
    parts += [page.heading("On which data"), page.table(card.data(run)), page.paragraph(card.CHECKSUMS)]
    if promise:
        parts += [
            page.heading("What was promised, and what was measured"),
            page.table(card.promised(promise)),
        ]
        parts.append(page.paragraph(card.NOT_HELD_OUT if promise.held_out_rise is None else card.HELD_OUT))
    if scores:
        parts.append(page.heading("Scores"))
        parts.append(
            page.table((f"{m}: {name}", row) for m, sets in scores.items() for name, row in sets.items())
        )
    parts += [page.heading("Step by step"), page.picture(folder / "curves.png")]
    if evaluations:
        numbers = lambda line: {name: value for name, value in line.items() if is_number(value)}
        rows = [
            (f"{line['step']}", {k: v for k, v in numbers(line).items() if k != "step"})
            for line in evaluations
        ]
        parts.append(page.folded("Evaluations, by steps done", page.table(rows)))
    parts += [page.heading("What this does not show"), page.listed(card.caveats(scores))]
    parts += [page.heading("How to make it again"), *card.reproduced(folder, config)]
    for name in ("config.json", "run.json"):
        if (path := folder / name).exists():
            parts.append(page.folded(name, page.preformatted(path.read_text())))
    written = folder / "report.html"
    write_whole(written, page.page(folder.resolve().name, parts))
    return written


def read(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray], list[dict[str, Any]]]:
    """run.json, and of metrics.jsonl the steps by name ([T] or [T, K]) and the evaluations."""
    try:
        run = json.loads((folder / "run.json").read_text())
        texts = (folder / "metrics.jsonl").read_text().splitlines()
        run = run | {"constraint": run["constraint"], "steps": run["steps"]}
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


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json of the command line; {} where a program of its own ran."""
    path = folder / "config.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def read_promise(folder: pathlib.Path) -> Promise | None:
    """promise.json of a finished run; None where there is none."""
    path = folder / "promise.json"
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        for name, value in values.items():
            values[name] = np.asarray(value, float) if isinstance(value, float | list) else value
        if values.get("held_out_rise") is not None:
            # Null, where there is no bound.
            values["held_out_bound"] = np.asarray(values["held_out_bound"], float)
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


def unfinished(run: dict[str, Any], steps: dict[str, np.ndarray], evaluations: list[dict[str, Any]]) -> bool:
    """Whether there are steps to do."""
    stopped = evaluations and evaluations[-1].get("stopped")
    return not stopped and len(steps["forget_loss"]) < run["steps"]


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
