"""SCRUB: a student that stays near the original on the retain set and leaves it on the forget set."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import Apply, Method, cross_entropy, descend, record


class ScrubState(NamedTuple):
    """The teacher's parameters, the optimiser's state, and the number of steps taken."""

    teacher: Any
    optimizer_state: Any
    taken: jax.Array


def distillation(teacher_logits: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """temperature^2 KL(teacher || student) of softened predictions, mean over the batch."""
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), -1))


def scrub(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    ascent_share,
    distillation_weight: float = 0.5,
    temperature: float = 4.0,
) -> Method:
    """Steps up in KL(teacher || student) on forget data among steps down on retain data.

    A step down descends CE(retain) + distillation_weight KL(teacher || student). Until `ascent_share`
    of the run, as many of the steps go up as the forget set has of the training set; then none. The
    teacher is the original model.

    Source: Kurmanji et al., arXiv 2302.09880, algorithm 1, which alternates a pass over the forget set
    with one over the retain set; the steps of the two passes are interleaved here.
    """

    def init(params, batches):
        del batches
        # Copies: the loop donates the parameters.
        return ScrubState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros([], jnp.int32))

    def up(params, teacher, batch):
        distance = distillation(apply(teacher, batch.forget.x), apply(params, batch.forget.x), temperature)
        return -distance, jnp.stack([-distance, jnp.nan])

    def down(params, teacher, batch):
        distance = distillation(apply(teacher, batch.retain.x), apply(params, batch.retain.x), temperature)
        loss = cross_entropy(apply, params, *batch.retain)
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
