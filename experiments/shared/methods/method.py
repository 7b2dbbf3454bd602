"""What every unlearning method is made of, so that one loop can run any of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.shared.data.images import Examples

Apply = Callable[[Any, Any], jax.Array]


class Batch(NamedTuple):
    """What a step sees: equally many examples to forget and to retain.

    `wrong` are labels int32 [n] to take the forget examples for; `progress` is the share of the
    run's steps that were taken before this one, float32 in [0, 1); `forget_share` is the share of the
    training set that is to be forgotten.
    """

    forget: Examples
    wrong: Any
    retain: Examples
    progress: Any
    forget_share: Any


class Method(NamedTuple):
    """init(params, batches) -> state; step(params, state, batch) -> (params, state, record).

    `batches` are batches with a leading axis that hold the whole forget set once. A record has the
    scalars of `record`.
    """

    init: Callable[[Any, Batch], Any]
    step: Callable[[Any, Any, Batch], tuple[Any, Any, dict[str, jax.Array]]]


def cross_entropy(apply: Apply, params: Any, x: Any, labels: Any) -> jax.Array:
    """Mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).mean()


def ascent_losses(apply: Apply) -> Callable[[Any, Batch], eu.Losses]:
    """U = minus the cross-entropy of the forget batch, R = the cross-entropy of the retain batch."""

    def losses_fn(params, batch):
        forget = -cross_entropy(apply, params, *batch.forget)
        return eu.Losses(forget, cross_entropy(apply, params, *batch.retain))

    return losses_fn


def random_label_losses(apply: Apply) -> Callable[[Any, Batch], eu.Losses]:
    """U = cross-entropy of the forget batch to wrong labels, R = of the retain batch to the true ones."""

    def losses_fn(params, batch):
        forget = cross_entropy(apply, params, batch.forget.x, batch.wrong)
        return eu.Losses(forget, cross_entropy(apply, params, *batch.retain))

    return losses_fn


def weighted(
    losses_fn,
    optimizer: optax.GradientTransformation,
    weights: Callable[[Batch], eu.Losses],
    space: Callable[[jax.Array], jax.Array] = lambda loss: loss,
) -> Method:
    """Descends <weights(batch), space(losses)>, one gradient per step; the weights see no parameters."""

    def step(params, state, batch):
        weight = weights(batch)

        def objective(params):
            losses = losses_fn(params, batch)
            return weight.forget * space(losses.forget) + weight.retain * space(losses.retain), losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        params, state = descend(optimizer, grads, state, params)
        return params, state, record(losses.forget, losses.retain, weight.retain / weight.forget)

    return Method(lambda params, batches: optimizer.init(params), step)


def shares(weight: Any) -> eu.Losses:
    """The weights (1, weight) of (U, R), divided by their sum."""
    return eu.Losses(1 / (1 + weight), weight / (1 + weight))


def descend(optimizer: optax.GradientTransformation, grads: Any, state: Any, params: Any):
    """Parameters and optimiser state after one step along the gradient."""
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def record(forget_loss: Any = jnp.nan, retain_loss: Any = jnp.nan, multiplier: Any = jnp.nan):
    """What a step saw of its own losses and weight; NaN for what a method does not have."""
    seen = {"forget_loss": forget_loss, "retain_loss": retain_loss, "multiplier": multiplier}
    return {name: jnp.asarray(value, jnp.float32) for name, value in seen.items()}
