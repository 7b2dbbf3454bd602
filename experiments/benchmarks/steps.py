"""The steps that are compared in JAX: one model, one inner optimiser, the same batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import eupmu_jax as eu
from eupmu_jax.method.losses import LossesFn
from experiments.benchmarks.models import INNER, Model, in_one_pass, in_two_passes

FLOOR, GUARDED = "linear scalarisation", "linear scalarisation, finite or skipped"
BUDGET, LAGGED = "EUPMU budget", "EUPMU lagged"
LOOKAHEAD, DIRECTIONAL = "EUPMU look-ahead", "EUPMU directional"
LAGRANGIAN = "Lagrangian"
EXACT, EXACT_SHARED = "exact surgery", "exact surgery, shared pass"

BASELINE = 100.0
"""R_0 of the budget, above any loss here: the controller neither measures nor pauses."""


class Step(NamedTuple):
    """A training step.

    Attributes:
      start: trained -> the first carry, parameters and state.
      step: (carry, batch) -> the next carry.
    """

    start: Callable[[Any], Any]
    step: Callable[[Any, Any], Any]


def scalarised(losses_fn: LossesFn, inner: optax.GradientTransformation) -> Step:
    """One weighted loss: what any method costs at least."""

    def step(carry, batch):
        def objective(trained):
            losses = losses_fn(trained, batch)
            return 0.5 * losses.forget + 0.5 * losses.retain.mean()

        trained, state = carry
        updates, state = inner.update(jax.grad(objective)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    return Step(lambda trained: (trained, inner.init(trained)), step)


def guarded(losses_fn: LossesFn, inner: optax.GradientTransformation) -> Step:
    """The same, but a step that is not finite is left out, by Optax's own wrapper."""
    return scalarised(losses_fn, optax.apply_if_finite(inner, max_consecutive_errors=2**30))


def implicit(
    losses_fn: LossesFn, inner: optax.GradientTransformation, constraint: eu.Budget | eu.Tolerance, **more
) -> Step:
    """`eupmu_jax.eupmu`."""
    tx = eu.eupmu(losses_fn, inner, constraint, **more)

    def step(carry, batch):
        trained, state = carry
        updates, state = tx.update(None, state, trained, batch=batch)
        return optax.apply_updates(trained, updates), state

    return Step(lambda trained: (trained, tx.init(trained)), step)


def lagrangian(losses_fn: LossesFn, inner: optax.GradientTransformation, constraint: eu.Budget) -> Step:
    """`eupmu_jax.lagrangian` under `eupmu_jax.saddle_point`."""
    loss_fn, tx = eu.lagrangian(losses_fn), eu.saddle_point(inner, constraint)

    def start(trained):
        weighted = eu.weighted(trained, constraint)
        return weighted, tx.init(weighted)

    def step(carry, batch):
        weighted, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(weighted, batch), state, weighted)
        return optax.apply_updates(weighted, updates), state

    return Step(start, step)


def exact(losses_fn: LossesFn, inner: optax.GradientTransformation) -> Step:
    """A gradient for each loss, and their projection."""
    grads_fn = eu.forget_and_retain_grads(losses_fn)
    tx = optax.chain(eu.explicit_surgery(eu.Tolerance(0.0)), inner)

    def step(carry, batch):
        trained, state = carry
        _, forget_grads, retain_grads = grads_fn(trained, batch)
        updates, state = tx.update(forget_grads, state, trained, retain_grads=retain_grads)
        return optax.apply_updates(trained, updates), state

    return Step(lambda trained: (trained, tx.init(trained)), step)


def steps_of(model: Model) -> dict[str, Step]:
    """All of them by name, the floor first."""
    apart, inner = in_two_passes(model.outputs), INNER[model.inner]()
    budget = eu.Budget(0.1, baseline=BASELINE)
    tolerance = lambda measure: eu.Tolerance(0.0, measure=measure)
    return {
        FLOOR: scalarised(apart, inner),
        GUARDED: guarded(apart, inner),
        BUDGET: implicit(apart, inner, budget),
        LAGGED: implicit(apart, inner, tolerance("lagged")),
        LOOKAHEAD: implicit(apart, inner, tolerance("lookahead")),
        DIRECTIONAL: implicit(apart, inner, tolerance("directional")),
        LAGRANGIAN: lagrangian(apart, inner, budget),
        EXACT: exact(apart, inner),
        EXACT_SHARED: exact(in_one_pass(model.outputs), inner),
    }
