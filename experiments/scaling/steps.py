"""The four training steps that are compared: one inner optimiser, one model, one pair of batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from eupmu_jax.method.constraints import Measure
from eupmu_jax.method.losses import LossesFn
from experiments.scaling.model import Size, next_token_losses

PLAIN, LAGGED, LOOKAHEAD, EXACT = "fine-tuning", "EUPMU lagged", "EUPMU lookahead", "exact surgery"


class Batch(NamedTuple):
    """Disjoint tokens [sequences, time + 1]; the last is only predicted."""

    forget: jax.Array
    retain: jax.Array


class Method(NamedTuple):
    """A training step.

    Attributes:
      init: params -> state.
      step: (params, state, batch) -> (params, state, losses).
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Batch], tuple[Any, Any, eu.Losses]]


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with float32 state and arithmetic on parameters and gradients of any width."""

    def init(params):
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params: Any = None):
        wide = optax.tree.cast(updates, jnp.float32)
        wide, state = inner.update(wide, state, optax.tree.cast(params, jnp.float32))
        return optax.tree.cast_like(wide, updates), state

    return optax.GradientTransformation(init, update)


def optimizer() -> optax.GradientTransformation:
    """AdamW with float32 moments after clipping by the global norm, as language models are trained."""
    adamw = optax.adamw(1e-5, b2=0.95, weight_decay=0.1)
    return in_float32(optax.chain(optax.clip_by_global_norm(1.0), adamw))


def losses(forget: jax.Array, retain: jax.Array) -> eu.Losses:
    """Of losses per sequence: descent on what to retain, bounded ascent on what to forget."""
    return eu.Losses(jax.nn.softplus(4 - jnp.mean(forget)), jnp.mean(retain))


def in_one_pass(size: Size) -> LossesFn:
    """Both losses from one pass over all sequences.

    Each weight is gathered once, and the backward pass has one gradient to sum over its layers: two passes
    have one each until both are done.
    """

    def losses_fn(params, batch):
        # Side by side, so that sequences stay on the chips where they are.
        both = jnp.stack([batch.forget, batch.retain], 1)
        each = next_token_losses(size, params, both.reshape(-1, both.shape[-1])).reshape(-1, 2)
        return losses(each[:, 0], each[:, 1])

    return losses_fn


def in_two_passes(size: Size) -> LossesFn:
    """A pass for each loss: a gradient of one of them costs no work on the other's sequences."""
    return lambda params, batch: losses(*(next_token_losses(size, params, part) for part in batch))


def fine_tuning(losses_fn: LossesFn) -> Method:
    """One weighted loss."""
    inner = optimizer()

    def step(params, state, batch):
        def objective(params):
            losses = losses_fn(params, batch)
            return 0.5 * losses.forget + 0.5 * losses.retain, losses

        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state, losses

    return Method(inner.init, step)


def eupmu(losses_fn: LossesFn, measure: Measure) -> Method:
    """Implicit surgery."""
    tx = eu.eupmu(losses_fn, optimizer(), eu.Tolerance(0.0, measure=measure))

    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)
        info = eu.surgery_info(state)
        return optax.apply_updates(params, updates), state, eu.Losses(info.forget_loss, info.retain_loss)

    return Method(tx.init, step)


def exact_surgery(losses_fn: LossesFn) -> Method:
    """Two gradients and their projection."""
    tx = optax.chain(eu.explicit_surgery(eu.Tolerance(0.0)), optimizer())
    grads_fn = eu.forget_and_retain_grads(losses_fn)

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        updates, state = tx.update(forget_grads, state, params, retain_grads=retain_grads)
        return optax.apply_updates(params, updates), state, losses

    return Method(tx.init, step)


METHODS: dict[str, Callable[[Size], Method]] = {
    PLAIN: lambda size: fine_tuning(in_one_pass(size)),
    LAGGED: lambda size: eupmu(in_one_pass(size), "lagged"),
    LOOKAHEAD: lambda size: eupmu(in_one_pass(size), "lookahead"),
    EXACT: lambda size: exact_surgery(in_two_passes(size)),
}
