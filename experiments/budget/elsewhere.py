"""The same promise on another data set and on another network."""

import dataclasses
import pathlib
from functools import partial
from typing import NamedTuple

from experiments.budget.controllers import EUPMU
from experiments.budget.study import FINE_TUNING, FORGETTING, Cell, Scale, contenders, make_runner
from experiments.shared.configs import CONFIGS, DIGITS, FASHION_MNIST, Config
from experiments.shared.records import Records
from experiments.shared.testbed import Progress, make_testbed, original_models, saved_task


class Place(NamedTuple):
    """A data set and a network, and the cells to run there; one trained model each."""

    config: Config
    cells: list[Cell]


def cells(
    tasks: tuple[str, ...],
    descents: tuple[tuple[str, float], ...],
    schedules: tuple[str, ...],
    budgets: tuple[float, ...],
) -> list[Cell]:
    """Every combination at batch size 64."""
    return [
        Cell(task, inner, rate, schedule, 64, budget, seed=0)
        for task in tasks
        for inner, rate in descents
        for schedule in schedules
        for budget in budgets
    ]


DESCENTS = (
    *(("SGD", 0.03), ("SGD", 0.1), ("momentum", 0.003), ("momentum", 0.01), ("momentum", 0.03)),
    *(("Adam", 0.0003), ("Adam", 0.001), ("Muon", 0.003)),
)
PLACES = {
    "digits, MLP": Place(
        dataclasses.replace(DIGITS, unlearning_epochs=20),
        cells(("class:3", "random:0.1"), DESCENTS, ("constant", "cosine"), (0.05, 0.1)),
    ),
    "digits, CNN": Place(
        dataclasses.replace(DIGITS, model="cnn", unlearning_epochs=20),
        cells(("class:3", "random:0.1"), DESCENTS, ("constant", "cosine"), (0.05, 0.1)),
    ),
    "Fashion-MNIST, CNN": Place(
        dataclasses.replace(FASHION_MNIST, model="cnn"),
        cells(("class:6", "random:0.1"), (("momentum", 0.01), ("Adam", 0.001)), ("constant",), (0.1,)),
    ),
}
SMOKE_PLACES = {
    "digits, CNN": Place(
        dataclasses.replace(CONFIGS["smoke"], model="cnn"),
        cells(("class:3",), (("momentum", 0.01),), ("constant",), (0.2,)),
    )
}


def runs_of(place: Place) -> list[tuple[str, Cell]]:
    """Every (name, cell) there, once."""
    alone = [(name, cell._replace(budget=0.0)) for cell in place.cells for name in (FINE_TUNING, FORGETTING)]
    return list(dict.fromkeys([(EUPMU, cell) for cell in place.cells] + alone))


def run_all(
    path: pathlib.Path,
    records: Records,
    places: dict[str, Place],
    data_dir: pathlib.Path,
    scale: Scale,
    progress: Progress,
) -> None:
    """A record ("elsewhere", place, name, *cell) for each run."""
    by_name = contenders(scale)
    for name, place in places.items():
        config = place.config
        if config.dataset == "fashion-mnist":
            config = dataclasses.replace(config, data_dir=data_dir)
        testbed = make_testbed(config)
        folder = path / name.replace(", ", "-")
        folder.mkdir(exist_ok=True)
        tasks = {cell.task: saved_task(testbed, folder, cell.task) for cell in place.cells}
        originals = original_models(testbed, folder, (0,), progress)
        run = make_runner(testbed, tasks, originals)
        for of, cell in runs_of(place):
            records.get(("elsewhere", name, of, *cell), partial(run, by_name[of], cell))
            progress(f"{name}, {of}: {cell.task}, {cell.inner} {cell.rate:g}", 1)
