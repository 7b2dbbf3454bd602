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

from experiments.classification.__main__ import run_with_progress
from experiments.classification.bench import Records
from experiments.classification.configs import FASHION_MNIST
from experiments.classification.report import runs_frame
from experiments.peers import Peer
from experiments.peers.eupmu import eupmu
from experiments.peers.random_labels import random_labels
from experiments.report import (
    Frame,
    Section,
    grid,
    new_run_dir,
    plain_numbers,
    provenance,
    save,
    write_csv,
    write_markdown,
    write_page,
)

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
DEMAND = {"raw": 0.03, "log": 0.02}
WEIGHTS = {"raw": (1, 3, 10, 30), "log": (0.1, 0.3, 1, 3)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Vary EUPMU's settings one at a time, and the learning rate under EUPMU and constant weights.

    Fashion-MNIST, the network and the tasks of the classification study. Writes tables.md, runs.csv, a
    picture and report.html to a new folder under --runs-dir; --resume continues in one.
    """

    tasks: tuple[str, ...] = ("class:6", "random:0.1", "memorised:0.1")
    """What to forget; see python -m experiments.classification --help."""

    training_seeds: tuple[int, ...] = (0, 1)
    """Of the trained models."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""

    resume: pathlib.Path | None = None
    """A folder of an interrupted run."""


class Variation(NamedTuple):
    """One line of a table: which knob, its value, and the method that has it."""

    knob: str
    value: str
    peer: Peer
    knobs: dict[str, float]


def variations() -> dict[str, Variation]:
    """By a name of their own. EUPMU is varied around the package's defaults, at the rate 0.01."""
    out = []
    for space in ("raw", "log"):
        log_losses = space == "log"
        base = {"learning_rate": 0.01, "demand": DEMAND[space]}

        def method(measure="lookahead", log_losses=log_losses, **settings):
            return Peer(partial(eupmu, measure=measure, log_losses=log_losses, **settings))

        for rate in RATES:
            at = {"learning_rate": rate}
            constant = Peer(partial(random_labels, log_losses=log_losses))
            for weight in WEIGHTS[space]:
                name = f"constant {weight:g} ({space})"
                out.append(
                    Variation("learning rate", f"{name} at {rate:g}", constant, at | {"weight": weight})
                )
            if space == "raw":
                ramp, name = Peer(partial(random_labels, ramped=True)), "ramp 1 to 10 (raw)"
                out.append(Variation("learning rate", f"{name} at {rate:g}", ramp, at | {"weight": 10}))
            for measure in ("lookahead", "lagged"):
                name = f"EUPMU {measure} ({space})"
                knobs = at | {"demand": DEMAND[space]}
                out.append(Variation("learning rate", f"{name} at {rate:g}", method(measure), knobs))
        for measure in ("lookahead", "lagged"):
            for demand in (-0.01, 0.0, 0.01, 0.03, 0.1):
                knob = f"tolerance, {measure} ({space})"
                knobs = base | {"demand": demand}
                out.append(Variation(knob, f"{0.0 - demand:g}", method(measure), knobs))
        duals = {
            "sgd 0.1": optax.sgd(0.1),
            "sgd 1": optax.sgd(1.0),
            "adam 0.01": optax.adam(0.01),
            "adam 0.05": optax.adam(0.05),
            "adam 0.2": optax.adam(0.2),
            "adam 1": optax.adam(1.0),
            "released": optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0)),
        }
        for name, dual in duals.items():
            out.append(Variation(f"dual optimiser ({space})", name, method(dual_optimizer=dual), base))
        for start in (0.0, 0.3, 1.0, 3.0, 10.0):
            peer = method(initial_multiplier=jnp.float32(start))
            out.append(Variation(f"initial multiplier ({space})", f"{start:g}", peer, base))
        for normalised in (True, False):
            peer = method(normalize_weights=normalised)
            out.append(Variation(f"normalised weights ({space})", str(normalised), peer, base))
        # Per unit of step length: the demand per step over the learning rate.
        directional = base | {"demand": base["demand"] / base["learning_rate"]}
        for measure, knobs in (
            ("lookahead", base),
            ("lagged", base),
            ("directional per length", directional),
        ):
            out.append(Variation(f"measure ({space})", measure, method(measure.split()[0]), knobs))
    return {f"{one.knob}: {one.value}": one for one in out}


def knob_tables(runs: Frame) -> list[Section]:
    """A section for each knob: gap, and UA / RA / TA / late multiplier, for each value and task."""
    columns = {"gap": 2, "UA": 1, "RA": 1, "TA": 1}
    sections = []
    for knob, part in runs.groupby("knob", sort=False):
        means = part.groupby(["value", "task"], sort=False)[list(columns)].mean()
        rows = {}
        for value in part["value"].unique():
            cells = rows.setdefault(value, {})
            for task in part["task"].unique():
                gap, ua, ra, ta = means.loc[(value, task)]
                cells[f"{task} gap"] = f"{gap:.2f}"
                cells["UA / RA / TA" + " " * list(part["task"].unique()).index(task)] = (
                    f"{ua:.1f} / {ra:.1f} / {ta:.1f}"
                )
        sections.append(Section(str(knob), pd.DataFrame(rows).T))
    return sections


def plot_rates(path: pathlib.Path, runs: Frame) -> None:
    """Gap to Retrain against the learning rate, a row for each space and a column for each task."""
    part = runs[runs["knob"] == "learning rate"].copy()
    part[["line", "rate"]] = part["value"].str.split(" at ", expand=True)
    part["rate"] = part["rate"].astype(float)
    tasks = list(part["task"].unique())
    figure, axes = grid(2 * len(tasks), len(tasks), 5, 3.8)
    for axis, (space, task) in zip(axes, [(s, t) for s in WEIGHTS for t in tasks], strict=True):
        chosen = part[(part["task"] == task) & part["line"].str.endswith(f"({space})")]
        for i, (line, of_line) in enumerate(chosen.groupby("line", sort=False)):
            means = of_line.groupby("rate")["gap"].mean()
            style = "-o" if str(line).startswith("EUPMU") else "--"
            axis.plot(means.index, means, style, label=str(line), color=f"C{i + 6 * (space == 'log')}")
        axis.set(xscale="log", yscale="log", title=f"forget {task} ({space})")
        axis.set(xlabel="learning rate", ylabel="gap to Retrain (points)")
        plain_numbers(axis.yaxis)
        axis.grid(alpha=0.3)
    save(figure, path, legend=4)


def main(config: Config) -> None:
    console = Console()
    start = time.perf_counter()
    path = config.resume or new_run_dir(config.runs_dir, "knobs")
    study_config = dataclasses.replace(
        FASHION_MNIST,
        tasks=config.tasks,
        training_seeds=config.training_seeds,
        unlearning_seeds=(200,),
        relearning_steps=10,
        runs_dir=config.runs_dir,
    )
    varied = variations()
    peers = {name: one.peer for name, one in varied.items()}
    entries = {name: (name, one.knobs) for name, one in varied.items()}
    console.print(f"{path} (interrupted? --resume {path})", soft_wrap=True, highlight=False)
    bench = run_with_progress(console, study_config, path, peers=peers, entries=entries)
    runs = runs_frame(Records(path / "records.jsonl"))
    runs = runs[runs["method"].isin(varied)]
    runs.insert(0, "knob", runs["method"].map(lambda name: varied[name].knob))
    runs.insert(1, "value", runs["method"].map(lambda name: varied[name].value))
    origin = provenance(study_config) | {"steps": bench.steps}
    write_csv(path / "runs.csv", runs.drop(columns=["method", "diverged"]), origin)
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
