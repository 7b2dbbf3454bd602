"""The runs of the study: cells of one grid under any controller, each finished one a record."""

import itertools
import zlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.budget.controllers import CONTROLLERS, EUPMU, FULL_SIGHT, RELEASED
from experiments.classification.bench import Bench, Records
from experiments.classification.study import Models
from experiments.shared.forget_sets import Task
from experiments.shared.loop import make_plan, make_unlearner, momentum
from experiments.shared.methods import Peer
from experiments.shared.methods.fine_tuning import fine_tuning
from experiments.shared.methods.method import cross_entropy
from experiments.shared.methods.random_labels import random_labels

FINE_TUNING = "fine-tuning"
FORGETTING = "forgetting only"
"""A budget that the first exceeds is infeasible; what the second leaves of one cannot be spent."""
INNER: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "SGD": optax.sgd,
    "momentum": momentum,
    "Adam": optax.adam,
    "Muon": optax.contrib.muon,
}
RATES = {
    "SGD": (0.01, 0.03, 0.1, 0.3, 1.0),
    "momentum": (0.001, 0.003, 0.01, 0.03, 0.1),
    "Adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "Muon": (3e-4, 3e-3, 3e-2),
}
CYCLES = 4
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": lambda progress: jnp.ones_like(progress),
    "cosine": lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
    "warm restarts": lambda progress: (1 + jnp.cos(jnp.pi * (CYCLES * progress % 1))) / 2,
}
"""Factor of the learning rate by the share of the run's steps that are done."""

WEIGHTS = tuple(np.geomspace(0.1, 300, 20).round(3).tolist())
CHUNKS = 47


class Cell(NamedTuple):
    """One problem: what to forget, how it is descended, and what it may cost; budget 0 where none is set."""

    task: str
    inner: str
    rate: float
    schedule: str
    batch_size: int
    budget: float
    seed: int


class Scale(NamedTuple):
    """How much of the study is done."""

    tasks: tuple[str, ...]
    budgets: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    rates: dict[str, tuple[float, ...]]
    weights: tuple[float, ...]
    seeds: tuple[int, ...]
    class_task: str
    class_rates: tuple[float, ...]
    convergence: dict[str, Any]


FULL = Scale(
    tasks=("class:6", "random:0.1", "subclass:6"),
    budgets=(0.05, 0.1, 0.2),
    batch_sizes=(16, 256, 1024),
    rates=RATES,
    weights=WEIGHTS,
    seeds=(0, 1),
    class_task="class:6",
    class_rates=(0.003, 0.01),
    convergence={},
)
SMOKE = Scale(
    tasks=("random:0.1",),
    budgets=(0.2,),
    batch_sizes=(16,),
    rates={"momentum": (0.01,)},
    weights=(1.0, 10.0),
    seeds=(0,),
    class_task="class:3",
    class_rates=(0.01,),
    convergence={"steps": 20, "seeds": 1, "problems": ("quadratic",)},
)


def middle(budgets: tuple[float, ...]) -> float:
    return budgets[len(budgets) // 2]


def grid_cells(scale: Scale) -> list[Cell]:
    """The grid: every inner optimiser, rate, schedule and budget at batch size 64, and other batch sizes."""
    problems = [
        (task, inner, rate, schedule, 64, budget)
        for task, inner in itertools.product(scale.tasks, scale.rates)
        for rate, schedule in itertools.product(scale.rates[inner], SCHEDULES)
        for budget in scale.budgets
    ]
    problems += itertools.product(
        scale.tasks, ("momentum",), (0.003, 0.01, 0.03), ("constant",), scale.batch_sizes, (0.1,)
    )
    return [Cell(*problem, seed=scale.seeds[i % len(scale.seeds)]) for i, problem in enumerate(problems)]


def comparison_cells(scale: Scale) -> list[Cell]:
    """The part of the grid on which all controllers are compared."""
    descents = [("momentum", 0.003), ("momentum", 0.01), ("momentum", 0.03), ("SGD", 0.1), ("Adam", 0.001)]
    return [
        Cell(task, inner, rate, schedule, 64, middle(scale.budgets), scale.seeds[0])
        for task, (inner, rate) in itertools.product(scale.tasks, descents)
        for schedule in ("constant", "warm restarts")
        if rate in scale.rates.get(inner, ())
    ]


def efficiency_cells(scale: Scale) -> list[Cell]:
    """The twelve cells on which constant weights are swept, for every trained model."""
    descents = [("momentum", 0.003), ("momentum", 0.01), ("Adam", 0.001), ("SGD", 0.1)]
    return [
        cell._replace(seed=seed)
        for cell in comparison_cells(scale)
        for seed in scale.seeds
        if cell.schedule == "constant" and (cell.inner, cell.rate) in descents
    ]


def weight_name(weight: float) -> str:
    return f"weight {weight:g}"


def all_runs(scale: Scale) -> list[tuple[str, Cell]]:
    """Every (controller, cell), once."""
    runs = [(EUPMU, cell) for cell in grid_cells(scale) + efficiency_cells(scale)]
    runs += [(name, cell._replace(budget=0.0)) for name in (FINE_TUNING, FORGETTING) for _, cell in runs]
    runs += [(name, cell) for name in CONTROLLERS for cell in comparison_cells(scale)]
    runs += [(FINE_TUNING, cell._replace(budget=0.0)) for cell in comparison_cells(scale)]
    runs += [
        (RELEASED, cell)
        for cell in grid_cells(scale)
        if (cell.inner, cell.rate, cell.schedule) == ("Muon", 0.003, "constant")
    ]
    runs += [
        (weight_name(weight), cell._replace(budget=0.0))
        for cell in efficiency_cells(scale)
        for weight in scale.weights
    ]
    return list(dict.fromkeys(runs))


def run_all(
    bench: Bench,
    records: Records,
    tasks: dict[str, Task],
    originals: Models,
    runs: Iterable[tuple[str, Cell]],
    progress: Callable[[str, float], None],
) -> None:
    run = make_runner(bench, tasks, originals)
    for name, cell in runs:
        records.get(("run", name, *cell), partial(run, name, cell))
        progress(f"{name}: {cell.task}, {cell.inner} {cell.rate:g}", 1)


def make_runner(bench: Bench, tasks: dict[str, Task], originals: Models):
    """run(name, cell) -> what the run came to."""
    apply, steps = bench.classifier.apply, bench.steps

    def retain_loss(params, rows):
        return cross_entropy(apply, params, bench.train.x[rows], bench.train.y[rows])

    @jax.jit
    def losses(params, forget_rows, retain_rows):
        forget = cross_entropy(apply, params, bench.train.x[forget_rows], bench.wrong[forget_rows])
        return forget, retain_loss(params, retain_rows)

    @cache
    def baseline(task: str, seed: int) -> tuple[float, float]:
        forget, retain = losses(originals[seed][0], tasks[task].forget, tasks[task].retain)
        return float(forget), float(retain)

    @cache
    def program(name: str, inner: str, schedule: str, task: str):
        if name == FINE_TUNING:
            make = fine_tuning
        elif name == FULL_SIGHT:
            observe = partial(retain_loss, rows=jnp.asarray(tasks[task].retain))
            make = partial(CONTROLLERS[name], observe=observe)
        else:
            make = CONTROLLERS.get(name, random_labels)
        optimizer = lambda rate: INNER[inner](lambda step: rate * SCHEDULES[schedule](step / steps))
        unlearner = make_unlearner(Peer(make), apply, optimizer=optimizer)

        @jax.jit
        def unlearn(knobs, params, key, forget_rows, share, rows):
            state = unlearner.init(knobs, params, bench.train, bench.wrong, forget_rows)
            progress = jnp.arange(steps) / steps
            data = (bench.train, bench.wrong, share, rows, progress)
            params, _, seen = unlearner.run(knobs, params, state, key, *data)
            return params, seen

        return unlearn

    def run(name: str, cell: Cell) -> dict[str, Any]:
        task = tasks[cell.task]
        # Batches of its own for every problem: else the luck of one stream is that of all.
        problem = zlib.crc32(repr(cell._replace(budget=0.0)).encode())
        sizes = {"steps": steps, "batch_size": cell.batch_size, "seed": problem}
        plan = make_plan(task.forget, task.retain, **sizes, independent=True)
        before = baseline(cell.task, cell.seed)
        knobs = {"learning_rate": cell.rate}
        if name in CONTROLLERS:
            knobs |= {"budget": cell.budget, "baseline": before[1]}
        elif name != FINE_TUNING:
            knobs["weight"] = 0.0 if name == FORGETTING else float(name.removeprefix("weight "))
        knobs = {knob: jnp.float32(value) for knob, value in knobs.items()}
        kind = name if name in CONTROLLERS or name == FINE_TUNING else "weight"
        unlearn = program(kind, cell.inner, cell.schedule, cell.task if name == FULL_SIGHT else "")
        inputs = (jax.random.key(cell.seed), plan.forget_rows, plan.forget_share, plan.rows)
        params, seen = unlearn(knobs, originals[cell.seed][0], *inputs)
        forget, retain = map(float, losses(params, task.forget, task.retain))
        every = max(1, steps // CHUNKS)
        means = lambda values: np.asarray(values, float)[: steps // every * every].reshape(-1, every).mean(1)
        record = {
            "forget_loss": forget,
            "retain_loss": retain,
            "before": before,
            "rises": (means(seen["retain_loss"]) - before[1]).round(5).tolist(),
        }
        if name != FINE_TUNING:
            record["multipliers"] = np.exp(means(np.log(seen["multiplier"] + 1e-6))).round(5).tolist()
        if "infeasible" in seen:
            record["infeasible"] = bool(seen["infeasible"][-1])
        return record

    return run
