"""What each knob of EUPMU does, and how it and constant weights take a wrong learning rate."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import optax
import pandas as pd

from experiments.shared import command, comparison
from experiments.shared.comparison import Setting, runs_frame
from experiments.shared.configs import FASHION_MNIST
from experiments.shared.data.images import FASHION_MNIST_DIR
from experiments.shared.methods.eupmu import eupmu
from experiments.shared.methods.scalarisation import scalarisation
from experiments.shared.peers import Peer
from experiments.shared.records import read_records
from experiments.shared.report import (
    REFERENCES,
    Frame,
    Picture,
    Section,
    grid,
    plain_numbers,
    save,
    start_run,
    write_csv,
    write_report,
)
from experiments.shared.terminal import progress_bar
from experiments.shared.testbed import describe, make_testbed

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


class Line(NamedTuple):
    """A method whose learning rate is varied: how it is drawn, and on which of two pictures."""

    name: str
    peer: Peer
    knobs: dict[str, float]

    @property
    def is_eupmu(self) -> bool:
        return self.peer.family == "EUPMU"


class Variation(NamedTuple):
    """One row of a table: which knob, its value, and the method that has it."""

    knob: str
    value: str
    peer: Peer
    knobs: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.knob}: {self.value}"


def varied_eupmu(**settings: Any) -> Peer:
    return Peer(partial(eupmu, **settings), family="EUPMU")


def lines(log_losses: bool) -> list[Line]:
    """Constant weights and EUPMU in one space, whose learning rate is varied."""
    space = "log" if log_losses else "raw"
    constant = Peer(partial(scalarisation, log_losses=log_losses))
    weights = (0.1, 0.3, 1) if log_losses else (1, 3, 10, 30)
    found = [Line(f"constant {w} ({space})", constant, {"weight": w}) for w in weights]
    if not log_losses:
        ramp = Peer(partial(scalarisation, ramped=True))
        found.append(Line("ramp 1 to 10 (raw)", ramp, {"weight": 10}))
    base = LOG_BASE if log_losses else BASE
    for measure in ("lookahead", "lagged"):
        peer = varied_eupmu(measure=measure, log_losses=log_losses)
        found.append(Line(f"EUPMU {measure} ({space})", peer, base))
    return found


def at_rate(line: Line, rate: float) -> Variation:
    return Variation(
        "learning rate", f"{line.name} at {rate:g}", line.peer, line.knobs | {"learning_rate": rate}
    )


def variations() -> dict[str, Variation]:
    """By a name of their own; EUPMU is varied around raw losses, the look-ahead and BASE."""
    of = lambda **settings: varied_eupmu(**{"measure": "lookahead"} | settings)
    out = [at_rate(line, rate) for line in (*lines(False), *lines(True)) for rate in RATES]
    for measure in ("lookahead", "lagged"):
        for demand in (-0.01, 0.0, 0.01, 0.03, 0.1):
            knobs = BASE | {"demand": demand}
            out.append(Variation(f"tolerance ({measure})", f"{0.0 - demand:g}", of(measure=measure), knobs))
    for name, dual in DUALS.items():
        out.append(Variation("dual optimiser", name, of(dual_optimizer=dual), BASE))
    for start in (0.0, 0.3, 1.0, 3.0, 10.0):
        out.append(Variation("initial multiplier", f"{start:g}", of(initial_multiplier=start), BASE))
    for normalised in (True, False):
        peer = of(normalize_weights=normalised)
        out.append(Variation("normalised weights", str(normalised), peer, BASE))
    # The directional tolerance is per unit of step length: the one per step over the learning rate.
    per_length = BASE | {"demand": BASE["demand"] / BASE["learning_rate"]}
    for measure, knobs in (("lookahead", BASE), ("lagged", BASE), ("directional", per_length)):
        out.append(Variation("measure", measure, of(measure=measure), knobs))
    for measure in ("lookahead", "lagged"):
        out.append(Variation("utilities", f"one ({measure})", of(measure=measure), BASE))
        of_each = of(measure=measure, classes=10)
        out.append(Variation("utilities", f"one for each class ({measure})", of_each, BASE))
    return {one.name: one for one in out}


def knob_tables(runs: Frame) -> list[Section]:
    """A section for each knob: the gap of each value on each task, and what it is made of."""
    sections = []
    for knob, part in runs.groupby("knob", sort=False):
        means = part.groupby(["value", "task"], sort=False)[["gap", "UA", "RA", "TA", "worst class"]].mean()
        rows = {}
        for (value, task), (gap, ua, ra, ta, worst) in means.iterrows():
            rows.setdefault(value, {})[task] = f"{gap:.2f} ({ua:.1f} / {ra:.1f} / {ta:.1f} / {worst:.1f})"
        text = "Gap (UA / RA / TA / worst class's TA)."
        sections.append(Section(str(knob), [text, pd.DataFrame(rows).T]))
    return sections


def plot_rates(path: pathlib.Path, runs: Frame) -> None:
    """Gap to Retrain against the learning rate, a row for each space and a column for each task."""
    gaps = runs.groupby(["method", "task"])["gap"].mean()
    tasks = list(runs["task"].unique())
    figure, axes = grid(2 * len(tasks), len(tasks), 5, 3.8)
    for axis, (of_space, task) in zip(
        axes, itertools.product((lines(False), lines(True)), tasks), strict=True
    ):
        for i, line in enumerate(of_space):
            means = [gaps.get((at_rate(line, rate).name, task), float("nan")) for rate in RATES]
            style, width = ("-", 2.5) if line.is_eupmu else ("--", 1.5)
            axis.plot(RATES, means, style, marker="o", label=line.name, color=f"C{i}", linewidth=width)
        axis.set(xscale="log", yscale="log", title=f"forget {task}")
        axis.set(xlabel="learning rate", ylabel="gap to Retrain (points)")
        plain_numbers(axis.yaxis)
        axis.grid(alpha=0.3)
        if task == tasks[0]:
            axis.legend(fontsize="small")
    save(figure, path)


def with_knobs(runs: Frame, varied: Mapping[str, Variation]) -> Frame:
    """The runs of these variations and of the references, with knob and value as first columns."""
    places = {name: (one.knob, one.value) for name, one in varied.items()}
    places |= {name: ("references", name) for name in REFERENCES}
    runs = runs[runs["method"].isin(list(places))]
    knobs, values = zip(*(places[name] for name in runs["method"]), strict=True)
    runs.insert(0, "knob", list(knobs))
    runs.insert(1, "value", list(values))
    return runs


def main(config: Config, resume: pathlib.Path | None = None) -> pathlib.Path:
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
    testbed = make_testbed(study_config, {name: one.peer for name, one in varied.items()})
    settings = {name: Setting(name, one.knobs) for name, one in varied.items()}
    path = resume or start_run(config.runs_dir, "knobs", config)
    with command.working_in(path) as console:
        with progress_bar(console, comparison.amount_of_work(study_config, len(settings))) as progress:
            comparison.run(testbed, path, progress, settings)
        runs = with_knobs(runs_frame(read_records(path / "records.jsonl")), varied)
        origin = describe(path, testbed)
        write_csv(path / "runs.csv", runs.drop(columns="method"), origin)
        plot_rates(path / "rates.png", runs)
        text = (
            "Gap: mean distance to Retrain in UA, RA, TA and MIA, in points; means over the training seeds."
        )
        sections = [Section("Learning rate", [text, Picture("rates.png")]), *knob_tables(runs)]
        write_report(path, "EUPMU's knobs", sections, origin)
    return path


if __name__ == "__main__":
    command.run(main, Config)
