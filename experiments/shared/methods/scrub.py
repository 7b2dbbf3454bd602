"""SCRUB: a student that stays near the original on the retain set and leaves it on the forget set."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import LossFunctions, Method, Params, descend, record, retain_loss


class ScrubState(NamedTuple):
    """The teacher's parameters, the optimiser's state, and the number of steps taken."""

    teacher: Params
    optimizer_state: optax.OptState
    taken: jax.Array


def scrub(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    ascent_share: jax.Array | float,
    distillation_weight: float = 0.5,
) -> Method:
    """Steps up in the divergence from the teacher on forget data among steps down on retain data.

    A step down descends R + distillation_weight times the divergence. Until `ascent_share` of the run, as
    many of the steps go up as the forget set has of the training set; then none. The teacher is the
    original model.

    Source: Kurmanji et al., arXiv 2302.09880, algorithm 1, which alternates a pass over the forget set
    with one over the retain set; the steps of the two passes are interleaved here.
    """

    def init(params, batches):
        del batches
        # Copies: the loop donates the parameters.
        return ScrubState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros([], jnp.int32))

    def up(params, teacher, batch):
        distance = losses.divergence(teacher, params, batch.forget)
        return -distance, jnp.stack([-distance, jnp.nan])

    def down(params, teacher, batch):
        distance = losses.divergence(teacher, params, batch.retain)
        loss = retain_loss(losses, params, batch)
        return loss + distillation_weight * distance, jnp.stack([jnp.nan, loss])

    def step(params, state, batch):
        is_due = jnp.floor((state.taken + 1) * batch.forget_share) > jnp.floor(
            state.taken * batch.forget_share
        )
        goes_up = is_due & (batch.progress < ascent_share)
        gradient = lambda objective: jax.grad(objective, has_aux=True)
        grads, seen = jax.lax.cond(goes_up, gradient(up), gradient(down), params, state.teacher, batch)
        params, optimizer_state = descend(optimizer, grads, state.optimizer_state, params)
        return params, ScrubState(state.teacher, optimizer_state, state.taken + 1), record(*seen)

    return Method(init, step)
