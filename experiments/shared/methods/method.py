"""What every unlearning method is made of, so that one loop can run any of them on any model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu

Params = Any
"""A pytree of arrays."""

Examples = Any
"""A pytree of arrays with a leading axis of examples: whatever the loss functions take."""


class LossFunctions(NamedTuple):
    """All that a method is told about a model and its task, as pure functions.

    Attributes:
      forget: (params, examples) -> [], what is minimised in order to forget.
      training: (params, examples) -> [n], what the model was trained with, of each example. Its mean is
        the retain loss of retain examples, and what ascent methods climb on forget examples.
      divergence: (reference, params, examples) -> [], how far the predictions under params are from
        those under other parameters.
    """

    forget: Callable[[Params, Examples], jax.Array]
    training: Callable[[Params, Examples], jax.Array]
    divergence: Callable[[Params, Params, Examples], jax.Array]


class Batch(NamedTuple):
    """What a step sees.

    Attributes:
      forget: examples to forget.
      retain: as many examples to retain.
      progress: the share of the run's steps that were taken before this one, in [0, 1).
      forget_share: the share of the training set that is to be forgotten.
    """

    forget: Examples
    retain: Examples
    progress: jax.Array
    forget_share: jax.Array


class Method(NamedTuple):
    """An unlearning method as pure functions.

    Attributes:
      init: (params, batches) -> state; `batches` have a leading axis and hold the whole forget set once.
      step: (params, state, batch) -> (params, state, record); a record has the scalars of `record`.
    """

    init: Callable[[Params, Batch], Any]
    step: Callable[[Params, Any, Batch], tuple[Params, Any, dict[str, jax.Array]]]


BatchLosses = Callable[[Params, Batch], eu.Losses]


def retain_loss(losses: LossFunctions, params: Params, batch: Batch) -> jax.Array:
    """R, the mean training loss of the retain batch."""
    return losses.training(params, batch.retain).mean()


def ascent_loss(losses: LossFunctions, params: Params, batch: Batch) -> jax.Array:
    """Minus the mean training loss of the forget batch."""
    return -losses.training(params, batch.forget).mean()


def forget_and_retain(losses: LossFunctions) -> BatchLosses:
    """U = the forget loss of the forget batch, R = the retain loss."""
    return lambda params, batch: eu.Losses(
        losses.forget(params, batch.forget), retain_loss(losses, params, batch)
    )


def ascent_and_retain(losses: LossFunctions) -> BatchLosses:
    """U = minus the training loss of the forget batch, R = the retain loss."""
    return lambda params, batch: eu.Losses(
        ascent_loss(losses, params, batch), retain_loss(losses, params, batch)
    )


def weighted(
    batch_losses: BatchLosses,
    optimizer: optax.GradientTransformation,
    weights: Callable[[Batch], eu.Losses],
    space: Callable[[jax.Array], jax.Array] = lambda loss: loss,
) -> Method:
    """Descends <weights(batch), space(losses)>, one gradient per step; the weights see no parameters."""

    def step(params, state, batch):
        weight = weights(batch)

        def objective(params):
            losses = batch_losses(params, batch)
            return weight.forget * space(losses.forget) + weight.retain * space(losses.retain), losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        params, state = descend(optimizer, grads, state, params)
        return params, state, record(losses.forget, losses.retain, weight.retain / weight.forget)

    return Method(lambda params, batches: optimizer.init(params), step)


def shares(weight: jax.Array | float) -> eu.Losses:
    """The weights (1, weight) of (U, R), divided by their sum."""
    return eu.Losses(1 / (1 + weight), weight / (1 + weight))


def descend(
    optimizer: optax.GradientTransformation, grads: Params, state: optax.OptState, params: Params
) -> tuple[Params, optax.OptState]:
    """Parameters and optimiser state after one step along the gradient."""
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def record(
    forget_loss: jax.Array | float = jnp.nan,
    retain_loss: jax.Array | float = jnp.nan,
    multiplier: jax.Array | float = jnp.nan,
) -> dict[str, jax.Array]:
    """What a step saw of its own losses and weight; NaN for what a method does not have."""
    seen = {"forget_loss": forget_loss, "retain_loss": retain_loss, "multiplier": multiplier}
    return {name: jnp.asarray(value, jnp.float32) for name, value in seen.items()}
