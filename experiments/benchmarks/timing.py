"""Compiled steps and their costs; wall-clock times of several programs, taken in turn."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.evaluation.cost import program_cost
from eupmu_jax.method.layouts import owned
from experiments.benchmarks.models import Model
from experiments.benchmarks.steps import Step

Block = Callable[[int], None]
"""block(n): n steps, and waits for them."""


CORES = 2


@contextlib.contextmanager
def on_few_cores() -> Iterator[None]:
    """Two cores for all that is started within: XLA has a thread for each core that it finds at first."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:CORES])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class Program(NamedTuple):
    """A compiled step: carry, batch -> carry, the carry donated; and what it takes."""

    run: Callable[[Any, Any], Any]
    costs: dict[str, float]


def compiled(function: Callable[[Any, Any], Any], carry: Any, batch: Any) -> Program:
    """Of arrays, or of their shapes; the costs include the seconds of tracing and of compiling."""
    start = time.perf_counter()
    program = jax.jit(function, donate_argnums=0).lower(carry, batch).compile()
    seconds = time.perf_counter() - start
    return Program(program, program_cost(program) | {"compile_seconds": seconds})


def stacked(model: Model) -> dict[str, Any]:
    """The rows of all steps of a block, [steps, ...]."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * model.steps), model.batch)


def scanned(step: Step) -> Callable[[Any, Any], Any]:
    """Many steps in one call: carry, (frozen, stacked rows) -> carry."""

    def run(carry, inputs):
        frozen, rows = inputs
        one = lambda carry, rows: (step.step(carry, {"frozen": frozen, **rows}), None)
        return jax.lax.scan(one, carry, rows)[0]

    return run


def start(step: Step, trained: Any) -> Any:
    """The first carry, of arrays that it alone has."""
    return owned(step.start(trained))


def block_of_calls(program: Program, carry: Any, batch: Any) -> Block:
    """A call for each step, none of which the host waits for."""

    def block(steps: int) -> None:
        nonlocal carry
        for _ in range(steps):
            carry = program.run(carry, batch)
        jax.block_until_ready(carry)

    return block


def block_of_scan(program: Program, carry: Any, inputs: Any) -> Block:
    """One call for all steps; less than all of them there are not, and one step is left out."""

    def block(steps: int) -> None:
        nonlocal carry
        if steps > 1:
            carry = jax.block_until_ready(program.run(carry, inputs))

    return block


def interleaved(
    blocks: Mapping[str, Block],
    steps: int,
    rounds: int,
    report: Callable[[str, float], None] = lambda what, part: None,
) -> dict[str, list[float]]:
    """Seconds of a step, of every block in every round: A B C A B C, each round from another one on.

    Before each of them a step is taken that does not count, until the caches and threads are its own.
    """
    names = list(blocks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            blocks[name](1)
            began = time.perf_counter()
            blocks[name](steps)
            seconds[name].append((time.perf_counter() - began) / steps)
            report(name, 1 / (rounds * len(names)))
    return seconds


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def ratios(of: list[float], to: list[float]) -> Spread:
    """Of what was measured in the same rounds."""
    low, median, high = np.quantile(np.asarray(of) / np.asarray(to), (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))
