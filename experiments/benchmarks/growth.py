"""What a step costs as the work grows: parameters, utilities, rows of a batch, tokens of a text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eupmu_jax as eu
from experiments.benchmarks.models import (
    INNER,
    SHORT_LLAMA,
    Model,
    count,
    decoder,
    in_two_passes,
    mlp,
)
from experiments.benchmarks.steps import EXACT, FLOOR, LAGGED, LOOKAHEAD, Step, exact, implicit, scalarised
from experiments.benchmarks.timing import block_of_calls, compiled, interleaved, start
from experiments.shared.records import Record

WIDTHS = (64, 256, 256, 10)
SIDES = {1e4: 69, 1e5: 281, 1e6: 964, 1e7: 3126, 1e8: 9963}
"""The width of two hidden layers that gives an MLP about so many parameters."""


class Axis(NamedTuple):
    """One way in which work grows.

    Attributes:
      values: at which it is measured.
      model: value -> the model.
      utilities: value -> K.
      timed: the largest value at which steps are run; beyond it they are compiled alone.
    """

    values: Sequence[float]
    model: Callable[[float], Model]
    utilities: Callable[[float], int] = lambda value: 1
    timed: float = np.inf


def of_size(parameters: float) -> Model:
    side = SIDES[parameters]
    return mlp((64, side, side, 10), 64, 5)


AXES = {
    "parameters": Axis(tuple(SIDES), of_size, timed=1e7),
    "utilities": Axis((1, 4, 16, 64), lambda value: mlp(WIDTHS, 64, 20), utilities=int),
    "rows": Axis((16, 64, 256, 1024), lambda value: mlp(WIDTHS, int(value), 20)),
    "tokens": Axis((32, 64, 128, 256, 512), lambda value: decoder(SHORT_LLAMA, False, 2, int(value), 3)),
}
SMOKE = {
    "parameters": Axis((1e4, 1e5), of_size, timed=1e4),
    "utilities": Axis((1, 4), lambda value: mlp((8, 16, 4), 8, 5), utilities=int, timed=0),
}


def rows_of(model: Model, utilities: int) -> dict[str, Step]:
    """The floor, and the methods whose growth differs from it or might."""
    losses_fn, inner = in_two_passes(model.outputs, utilities), INNER[model.inner]()
    more = {"initial_multiplier": jnp.ones(utilities)} if utilities > 1 else {}
    return {
        FLOOR: scalarised(losses_fn, inner),
        LAGGED: implicit(losses_fn, inner, eu.Tolerance(0.0), **more),
        LOOKAHEAD: implicit(losses_fn, inner, eu.Tolerance(0.0, measure="lookahead"), **more),
        EXACT: exact(losses_fn, inner),
    }


def measure(axis: Axis, value: float, rounds: int) -> Record:
    """Costs by row, and seconds of a step by row in every round where steps are run."""
    model = axis.model(value)
    rows = rows_of(model, axis.utilities(value))
    shapes = jax.eval_shape(model.init)
    batch: Any = {"frozen": shapes.frozen, **model.batch}
    programs = {
        name: compiled(step.step, jax.eval_shape(step.start, shapes.trained), batch)
        for name, step in rows.items()
    }
    seconds: dict[str, list[float]] = {}
    if value <= axis.timed:
        trained, frozen = model.init()
        batch["frozen"] = frozen
        blocks = {
            name: block_of_calls(programs[name], start(step, trained), batch) for name, step in rows.items()
        }
        seconds = interleaved(blocks, model.steps, rounds)
    costs = {name: program.costs for name, program in programs.items()}
    return {"parameters": count(shapes.trained), "costs": costs, "seconds": seconds}


def exponent(values: Sequence[float], found: Sequence[float]) -> float:
    """p of the power law c x^p through the last three points, by least squares in the logarithms."""
    last = slice(-3, None)
    return float(np.polyfit(np.log(values[last]), np.log(found[last]), 1)[0])
