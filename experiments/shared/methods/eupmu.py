"""EUPMU: the method of this package."""

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from eupmu_jax.method.eupmu import Eupmu
from experiments.shared.methods.method import (
    BatchLosses,
    LossFunctions,
    Method,
    forget_and_retain,
    record,
)


def eupmu(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    demand: jax.Array | float,
    classes: int = 0,
    initial_multiplier: jax.Array | float = 1.0,
    **settings,
) -> Method:
    """`eupmu_jax.eupmu` with a tolerance of -demand: the retain loss is asked to fall a little every step.

    With `classes` there are as many utilities: the retain loss of each class, which start with equal
    multipliers that sum to 1. `settings` are those of the tolerance.
    """
    losses_fn = per_class_losses(losses, classes) if classes else forget_and_retain(losses)
    if classes:
        initial_multiplier = jnp.full(classes, 1 / classes)
    constraint = eu.Tolerance(-demand, **settings)
    tx = eu.eupmu(losses_fn, optimizer, constraint, initial_multiplier=initial_multiplier)

    return method_of(tx)


def eupmu_budget(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    budget: jax.Array | float,
    baseline: jax.Array | float,
) -> Method:
    """`eupmu_jax.eupmu` with a budget for the whole run, and whether it looks infeasible or broken."""
    return method_of(
        eu.eupmu(forget_and_retain(losses), optimizer, eu.Budget(budget, baseline=baseline)), True
    )


def method_of(tx: Eupmu, records_trouble: bool = False) -> Method:
    """As a method; of several utilities it records the mean loss and the sum of multipliers."""

    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)
        info = eu.surgery_info(state)
        seen = record(info.forget_loss, info.retain_loss.mean(), info.multiplier.sum())
        if records_trouble:
            seen |= {"infeasible": info.infeasible, "skipped_steps": info.skipped_steps}
        return optax.apply_updates(params, updates), state, seen

    return Method(lambda params, batches: tx.init(params), step)


def per_class_losses(losses: LossFunctions, classes: int) -> BatchLosses:
    """R_k = the mean training loss of the retain examples with label k, 0 where the batch has none."""

    def losses_fn(params, batch):
        of_class = jax.nn.one_hot(batch.retain.y, classes)
        means = losses.training(params, batch.retain) @ of_class / jnp.maximum(of_class.sum(0), 1)
        return eu.Losses(losses.forget(params, batch.forget), means)

    return losses_fn
