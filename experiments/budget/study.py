"""The runs of the study: cells of one grid under any controller, each finished one a record."""

import itertools
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu
from eupmu_jax.run.batches import retain_sets
from eupmu_jax.run.promise import REPAIR_ROWS, Retained, retained, within
from experiments.budget.controllers import CONTROLLERS, EUPMU, RELEASED, Contender
from experiments.shared.forget_sets import Task
from experiments.shared.labels import LabelledExamples
from experiments.shared.loop import (
    Plan,
    Unlearner,
    in_float32,
    make_plan,
    make_unlearner,
    momentum,
    taken,
)
from experiments.shared.methods.fine_tuning import fine_tuning
from experiments.shared.methods.method import Method, Params
from experiments.shared.methods.scalarisation import scalarisation
from experiments.shared.records import Record, Records
from experiments.shared.testbed import Models, Progress, Testbed

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


def weight_names(scale: Scale) -> list[str]:
    return [weight_name(weight) for weight in scale.weights]


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
        (name, cell._replace(budget=0.0)) for cell in efficiency_cells(scale) for name in weight_names(scale)
    ]
    return list(dict.fromkeys(runs))


def contenders(scale: Scale) -> dict[str, Contender]:
    """Everything that a cell is run under, by display name."""
    at = lambda weight: Contender(scalarisation, lambda budget, baseline: {"weight": weight})
    constant = {weight_name(weight): at(weight) for weight in scale.weights}
    tuned = Contender(fine_tuning, lambda budget, baseline: {})
    return CONTROLLERS | {FINE_TUNING: tuned, FORGETTING: at(0.0)} | constant


def run_all(
    testbed: Testbed,
    records: Records,
    tasks: dict[str, Task],
    originals: Models,
    scale: Scale,
    progress: Progress,
) -> None:
    run = make_runner(testbed, tasks, originals)
    by_name = contenders(scale)
    for name, cell in all_runs(scale):
        records.get(("run", name, *cell), partial(run, by_name[name], cell))
        progress(f"{name}: {cell.task}, {cell.inner} {cell.rate:g}", 1)


def make_runner(
    testbed: Testbed, tasks: dict[str, Task], originals: Models
) -> Callable[[Contender, Cell], Record]:
    """run(contender, cell) -> what the run came to."""
    train, losses, steps = testbed.train, testbed.losses, testbed.steps

    def retain_loss(params: Params, rows: Any) -> jax.Array:
        return losses.training(params, taken(train, rows)).mean()

    @jax.jit
    def whole_losses(params, forget_rows, retain_rows):
        return losses.forget(params, taken(train, forget_rows)), retain_loss(params, retain_rows)

    @cache
    def before(task: str, seed: int) -> tuple[float, float]:
        forget, retain = whole_losses(originals[seed].params, tasks[task].forget, tasks[task].retain)
        return float(forget), float(retain)

    @cache
    def program(make: Callable[..., Method], inner: str, schedule: str):
        optimizer = lambda rate: INNER[inner](lambda step: rate * SCHEDULES[schedule](step / steps))
        return compiled(make_unlearner(make, losses, optimizer=optimizer), train, steps)

    @cache
    def seeing(make: Callable[..., Method], task: str) -> Callable[..., Method]:
        rows = jnp.asarray(tasks[task].retain)
        return partial(make, full_retain_loss=partial(retain_loss, rows=rows))

    @cache
    def retained_rows(task: str) -> Retained:
        of_batch = lambda params, batch: eu.Losses(0.0, losses.training(params, batch["retain"]).mean())
        rows = retain_sets(
            jax.device_get(taken(train, tasks[task].retain)), min(REPAIR_ROWS // 2, tasks[task].retain.size)
        )
        nothing_frozen = jax.tree.map(lambda leaf: None, originals[0].params)
        return retained(of_batch, nothing_frozen, None, rows, seed=0)

    def run(contender: Contender, cell: Cell) -> Record:
        task, original = tasks[cell.task], originals[cell.seed].params
        # Batches of its own for every problem: else the luck of one stream is that of all.
        problem = zlib.crc32(repr(cell._replace(budget=0.0)).encode())
        sizes = {"steps": steps, "batch_size": cell.batch_size, "seed": problem}
        plan = make_plan(task.forget, task.retain, **sizes, independent=True)
        forget_before, retain_before = before(cell.task, cell.seed)
        knobs = {"learning_rate": cell.rate} | contender.knobs(cell.budget, retain_before)
        make = seeing(contender.make, cell.task) if contender.sees_all else contender.make
        unlearn = program(make, cell.inner, cell.schedule)
        params, seen = unlearn(in_float32(knobs), original, jax.random.key(cell.seed), plan)
        forget, retain = map(float, whole_losses(params, task.forget, task.retain))
        end = {}
        if contender.is_repaired:
            end = {"forget_loss unrepaired": forget, "retain_loss unrepaired": retain}
            budget = eu.Budget(cell.budget, baseline=retain_before)
            params, promise = within(params, retained_rows(cell.task), budget, lambda: original)
            end |= {"repair_steps": promise.repair_steps, "holds": promise.holds, "way": promise.way}
            end["measured_on"] = promise.examples
            forget, retain = map(float, whole_losses(params, task.forget, task.retain))
        every = max(1, steps // CHUNKS)
        means = lambda values: np.asarray(values, float)[: steps // every * every].reshape(-1, every).mean(1)
        record = {
            "forget_loss": forget,
            "retain_loss": retain,
            "forget_loss before": forget_before,
            "retain_loss before": retain_before,
            **end,
            "rises": (means(seen["retain_loss"]) - retain_before).round(5).tolist(),
        }
        multipliers = np.asarray(seen["multiplier"])
        if np.any(np.isfinite(multipliers)):
            record["multipliers"] = np.exp(means(np.log(multipliers + 1e-6))).round(5).tolist()
        if "infeasible" in seen:
            record["infeasible"] = bool(seen["infeasible"][-1])
            record["skipped_steps"] = int(seen["skipped_steps"][-1])
        return record

    return run


def compiled(unlearner: Unlearner, train: LabelledExamples, steps: int):
    """unlearn(knobs, params, key, plan) -> (params, what each step saw), one program for all settings."""

    @jax.jit
    def unlearn(knobs, params, key, plan: Plan):
        state = unlearner.init(knobs, params, train, plan.forget_set)
        progress = jnp.arange(steps) / steps
        data = (train, plan.forget_share, plan.rows, progress)
        params, _, seen = unlearner.run(knobs, params, state, key, *data)
        return params, seen

    return unlearn
