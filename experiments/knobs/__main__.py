"""What each knob of EUPMU does, and how it and constant weights take a wrong learning rate."""

import dataclasses
import pathlib
import sys
import time
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import optax
import pandas as pd
import tyro
from rich.console import Console

from experiments.classification import study
from experiments.classification.bench import make_bench, read_records
from experiments.classification.configs import FASHION_MNIST
from experiments.classification.report import describe, runs_frame
from experiments.shared.data.images import FASHION_MNIST_DIR
from experiments.shared.methods import Peer
from experiments.shared.methods.eupmu import eupmu
from experiments.shared.methods.random_labels import random_labels
from experiments.shared.report import (
    REFERENCES,
    Frame,
    Section,
    grid,
    plain_numbers,
    save,
    saved_config,
    start_run,
    write_csv,
    write_markdown,
    write_page,
)
from experiments.shared.terminal import progress_bar

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
BASE = {"learning_rate": 0.01, "demand": 0.03}
LOG_BASE = {"learning_rate": 0.01, "demand": 0.02}
DUALS = {
    "sgd 0.1": optax.sgd(0.1),
    "sgd 1": optax.sgd(1.0),
    "adam 0.01": optax.adam(0.01),
    "adam 0.05": optax.adam(0.05),
    "adam 0.2": optax.adam(0.2),
    "adam 1": optax.adam(1.0),
    "released": optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Vary EUPMU's settings one at a time, and the learning rate under EUPMU and constant weights.

    Fashion-MNIST, the network and the tasks of the classification study. Writes tables.md, runs.csv, a
    picture and report.html to a new folder under --runs-dir.
    """

    tasks: tuple[str, ...] = ("class:6", "random:0.1", "memorised:0.1")
    """What to forget; see python -m experiments.classification --help."""

    training_seeds: tuple[int, ...] = (0, 1)
    """Of the trained models."""

    data_dir: pathlib.Path = FASHION_MNIST_DIR
    """Folder of Fashion-MNIST's four IDX files, gzipped or not."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""

    resume: pathlib.Path | None = None
    """The folder of an interrupted run to continue with that run's settings."""


class Variation(NamedTuple):
    """One line of a table: which knob, its value, and the method that has it."""

    knob: str
    value: str
    peer: Peer
    knobs: dict[str, float]


def variations() -> dict[str, Variation]:
    """By a name of their own; EUPMU is varied around raw losses, the package's defaults and BASE."""
    method = lambda **settings: Peer(partial(eupmu, **settings))
    constant = lambda **settings: Peer(partial(random_labels, **settings))
    lines: dict[str, tuple[Peer, dict[str, float]]]
    lines = {f"constant {w} (raw)": (constant(), {"weight": w}) for w in (1, 3, 10, 30)}
    lines["ramp 1 to 10 (raw)"] = (constant(ramped=True), {"weight": 10})
    for measure in ("lookahead", "lagged"):
        lines[f"EUPMU {measure} (raw)"] = (method(measure=measure), BASE)
    lines |= {f"constant {w} (log)": (constant(log_losses=True), {"weight": w}) for w in (0.1, 0.3, 1)}
    for measure in ("lookahead", "lagged"):
        lines[f"EUPMU {measure} (log)"] = (method(measure=measure, log_losses=True), LOG_BASE)
    out = [
        Variation("learning rate", f"{line} at {rate:g}", peer, knobs | {"learning_rate": rate})
        for line, (peer, knobs) in lines.items()
        for rate in RATES
    ]
    for measure in ("lookahead", "lagged"):
        for demand in (-0.01, 0.0, 0.01, 0.03, 0.1):
            knobs = BASE | {"demand": demand}
            out.append(
                Variation(f"tolerance ({measure})", f"{0.0 - demand:g}", method(measure=measure), knobs)
            )
    for name, dual in DUALS.items():
        out.append(Variation("dual optimiser", name, method(dual_optimizer=dual), BASE))
    for start in (0.0, 0.3, 1.0, 3.0, 10.0):
        peer = method(initial_multiplier=jnp.float32(start))
        out.append(Variation("initial multiplier", f"{start:g}", peer, BASE))
    for normalised in (True, False):
        out.append(
            Variation("normalised weights", str(normalised), method(normalize_weights=normalised), BASE)
        )
    # The directional tolerance is per unit of step length: the one per step over the learning rate.
    per_length = BASE | {"demand": BASE["demand"] / BASE["learning_rate"]}
    for measure, knobs in (("lookahead", BASE), ("lagged", BASE), ("directional", per_length)):
        out.append(Variation("measure", measure, method(measure=measure), knobs))
    for measure in ("lookahead", "lagged"):
        out.append(Variation("utilities", f"one ({measure})", method(measure=measure), BASE))
        of_each = method(measure=measure, classes=10)
        out.append(Variation("utilities", f"one for each class ({measure})", of_each, BASE))
    return {f"{one.knob}: {one.value}": one for one in out}


def knob_tables(runs: Frame) -> list[Section]:
    """A section for each knob: the gap of each value on each task, and what it is made of."""
    sections = []
    for knob, part in runs.groupby("knob", sort=False):
        means = part.groupby(["value", "task"], sort=False)[["gap", "UA", "RA", "TA", "worst class"]].mean()
        rows = {}
        for (value, task), (gap, ua, ra, ta, worst) in means.iterrows():
            rows.setdefault(value, {})[task] = f"{gap:.2f} ({ua:.1f} / {ra:.1f} / {ta:.1f} / {worst:.1f})"
        sections.append(Section(str(knob), "Gap (UA / RA / TA / worst class's TA).", pd.DataFrame(rows).T))
    return sections


def plot_rates(path: pathlib.Path, runs: Frame) -> None:
    """Gap to Retrain against the learning rate, a row for each space and a column for each task."""
    part = runs[runs["knob"] == "learning rate"].copy()
    part[["line", "rate"]] = part["value"].str.split(" at ", expand=True)
    part["rate"] = part["rate"].astype(float)
    tasks = list(part["task"].unique())
    figure, axes = grid(2 * len(tasks), len(tasks), 5, 3.8)
    for axis, (space, task) in zip(axes, [(s, t) for s in ("raw", "log") for t in tasks], strict=True):
        chosen = part[(part["task"] == task) & part["line"].str.endswith(f"({space})")]
        for i, (line, of_line) in enumerate(chosen.groupby("line", sort=False)):
            means = of_line.groupby("rate")["gap"].mean()
            style = {"linewidth": 2.5} if str(line).startswith("EUPMU") else {"linestyle": "--"}
            axis.plot(means.index, means, marker="o", label=str(line), color=f"C{i}", **style)
        axis.set(xscale="log", yscale="log", title=f"forget {task}")
        axis.set(xlabel="learning rate", ylabel="gap to Retrain (points)")
        plain_numbers(axis.yaxis)
        axis.grid(alpha=0.3)
        if task == tasks[0]:
            axis.legend(fontsize="small")
    save(figure, path)


def main(config: Config) -> None:
    console = Console()
    start = time.perf_counter()
    if config.resume:
        saved = saved_config(config.resume, "knobs")
        config = dataclasses.replace(
            config, tasks=tuple(saved["tasks"]), training_seeds=tuple(saved["training_seeds"])
        )
    study_config = dataclasses.replace(
        FASHION_MNIST,
        data_dir=config.data_dir,
        tasks=config.tasks,
        training_seeds=config.training_seeds,
        unlearning_seeds=(200,),
        relearning_steps=0,
        five_features=False,
    )
    varied = variations()
    peers = {name: one.peer for name, one in varied.items()}
    entries = {name: (name, one.knobs) for name, one in varied.items()}
    bench = make_bench(study_config, peers)
    path = config.resume or start_run(config.runs_dir, "knobs", config)
    console.print(f"{path} (interrupted? --resume {path})", soft_wrap=True, highlight=False)
    with progress_bar(console, study.amount_of_work(study_config, len(entries))) as progress:
        study.run_entries(bench, path, progress, entries)
    runs = runs_frame(read_records(path / "records.jsonl"))
    names = {name: (one.knob, one.value) for name, one in varied.items()}
    names |= {name: ("references", name) for name in REFERENCES}
    runs = runs[runs["method"].isin(list(names))]
    runs.insert(0, "knob", runs["method"].map(lambda name: names[name][0]))
    runs.insert(1, "value", runs["method"].map(lambda name: names[name][1]))
    origin = describe(path, bench)
    write_csv(path / "runs.csv", runs.drop(columns="method"), origin)
    plot_rates(path / "rates.png", runs)
    text = "Gap: mean distance to Retrain in UA, RA, TA and MIA, in points; means over the training seeds."
    sections = [Section("Learning rate", text, "rates.png"), *knob_tables(runs)]
    write_markdown(path / "tables.md", "EUPMU's knobs", sections, origin)
    write_page(path / "report.html", "EUPMU's knobs", sections, origin)
    console.print(f"{time.perf_counter() - start:.0f} s. All of it: {path / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m experiments.knobs"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
