"""PDU: a primal-dual method with an absolute bound on the retain loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import Apply, Method, descend, random_label_losses, record


class PduState(NamedTuple):
    """The multiplier, and the optimiser's state."""

    multiplier: jax.Array
    optimizer_state: Any


def pdu(apply: Apply, optimizer: optax.GradientTransformation, *, bound, dual_rate) -> Method:
    """Descends U + mu R; mu <- max(0, mu + dual_rate (R - bound)), with the batch's R, mu_0 = 1.

    Source: arXiv 2506.05314 and open-unlearning for the dual step; the forget loss is EUPMU's here,
    so that the two differ in the constraint alone.
    """
    losses_fn = random_label_losses(apply)

    def init(params, batches):
        del batches
        return PduState(jnp.ones([]), optimizer.init(params))

    def step(params, state, batch):
        def objective(params):
            losses = losses_fn(params, batch)
            return losses.forget + state.multiplier * losses.retain, losses

        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params)
        params, optimizer_state = descend(optimizer, grads, state.optimizer_state, params)
        multiplier = jnp.maximum(0.0, state.multiplier + dual_rate * (losses.retain - bound))
        seen = record(losses.forget, losses.retain, state.multiplier)
        return params, PduState(multiplier, optimizer_state), seen

    return Method(init, step)
