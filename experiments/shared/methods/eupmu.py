"""EUPMU: the method of this package, on random labels."""

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.shared.methods.method import Apply, Method, random_label_losses, record


def eupmu(
    apply: Apply, optimizer: optax.GradientTransformation, *, demand, classes: int = 0, **settings
) -> Method:
    """`eupmu_jax.eupmu` with tolerance -demand: the retain loss is asked to fall a little every step.

    With `classes` there are as many utilities: the retain loss of each class, which start with equal
    multipliers that sum to 1. The recorded multiplier is their sum, the retain loss their mean.
    """
    losses_fn = per_class_losses(apply, classes) if classes else random_label_losses(apply)
    if classes:
        settings["initial_multiplier"] = jnp.full(classes, 1 / classes)
    tx = eu.eupmu(losses_fn, optimizer, tolerance=-demand, **settings)

    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)  # pyright: ignore[reportArgumentType]
        info = eu.surgery_info(state)
        params = optax.apply_updates(params, updates)
        return params, state, record(info.forget_loss, info.retain_loss.mean(), info.multiplier.sum())

    return Method(lambda params, batches: tx.init(params), step)


def eupmu_budget(apply: Apply, optimizer: optax.GradientTransformation, *, budget, baseline) -> Method:
    """`eupmu_jax.eupmu` with a budget for the whole run; records, too, whether it looks infeasible."""
    tx = eu.eupmu(random_label_losses(apply), optimizer, budget=budget, retain_baseline=baseline)

    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)  # pyright: ignore[reportArgumentType]
        info = eu.surgery_info(state)
        seen = record(info.forget_loss, info.retain_loss, info.multiplier)
        return optax.apply_updates(params, updates), state, seen | {"infeasible": info.infeasible}

    return Method(lambda params, batches: tx.init(params), step)


def per_class_losses(apply: Apply, classes: int):
    """R_k = the mean cross-entropy of the batch's retain examples of class k, 0 where it has none."""
    one_loss = random_label_losses(apply)

    def losses_fn(params, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            apply(params, batch.retain.x), batch.retain.y
        )
        of_class = jax.nn.one_hot(batch.retain.y, classes)
        means = losses @ of_class / jnp.maximum(of_class.sum(0), 1)
        return eu.Losses(one_loss(params, batch).forget, means)

    return losses_fn
