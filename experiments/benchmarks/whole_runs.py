"""`unlearn` from end to end against its bare steps: the same compiled step on batches that lie ready."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import eupmu_jax as eu
from experiments.benchmarks.models import INNER, Model, in_two_passes
from experiments.benchmarks.steps import BASELINE
from experiments.shared.records import Record

FORGET_BATCHES, RETAIN_BATCHES = 4, 16
"""The sets' lengths in batches."""


def measure(model: Model, rounds: int, report: Callable[[str, float], None]) -> Record:
    """Seconds of a step in `unlearn` and of a bare one in every round, and of all that is not a step.

    The run pauses once a round, and what is timed there are as many bare steps: both take turns. "seconds" is
    the whole run without the bare steps; "rest" is what of it was not a step: compiling, measuring the
    retain set before and after, the pauses themselves.
    """
    trained, frozen = model.init()
    of_frozen = in_two_passes(model.outputs)
    losses_fn = lambda params, batch: of_frozen(params, {"frozen": frozen, **batch})
    inner, budget = INNER[model.inner](), eu.Budget(0.1, baseline=BASELINE)
    step, params, state = eu.training_step(eu.eupmu(losses_fn, inner, budget), trained)
    found: dict[str, list[float]] = {"unlearn": [], "bare": []}
    resumed, in_bare = 0.0, 0.0

    def bare() -> float:
        nonlocal params, state
        began = time.perf_counter()
        for _ in range(model.steps):
            params, state, _ = step(params, state, model.batch)
        jax.block_until_ready(params)
        return time.perf_counter() - began

    def pause(_: Any, metrics: dict[str, Any]) -> None:
        nonlocal resumed, in_bare
        paused = time.perf_counter()
        seconds = bare()
        # The first steps of a run compile, and find out how many to take at a time.
        if metrics["step"] > 2 * model.steps:
            found["unlearn"].append((paused - resumed) / model.steps)
            found["bare"].append(seconds / model.steps)
        report("unlearn beside its bare steps", 1 / (rounds + 3))
        in_bare += time.perf_counter() - paused
        resumed = time.perf_counter()

    params, state, _ = step(params, state, model.batch)
    sets = {
        name: jax.tree.map(lambda leaf, times=times: np.concatenate([leaf] * times), model.batch[name])
        for name, times in {"forget": FORGET_BATCHES, "retain": RETAIN_BATCHES}.items()
    }
    began = time.perf_counter()
    eu.unlearn(
        losses_fn,
        trained,
        sets["forget"],
        sets["retain"],
        inner,
        budget,
        steps=(rounds + 2) * model.steps,
        every=model.steps,
        batch_size=len(model.batch["forget"]["y"]),
        callbacks=[pause],
    )
    seconds = time.perf_counter() - began - in_bare
    rest = seconds - (rounds + 2) * model.steps * float(np.median(found["unlearn"]))
    return {"seconds": seconds, "rest": rest, **found}
