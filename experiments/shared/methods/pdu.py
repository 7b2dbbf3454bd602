"""PDU: a primal-dual method with an absolute bound on the retain loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import LossFunctions, Method, descend, forget_and_retain, record


class PduState(NamedTuple):
    """The multiplier, and the optimiser's state."""

    multiplier: jax.Array
    optimizer_state: optax.OptState


def pdu(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    bound: jax.Array | float,
    dual_rate: jax.Array | float,
) -> Method:
    """Descends U + mu R; mu <- max(0, mu + dual_rate (R - bound)), with the batch's R, mu_0 = 1.

    Source: arXiv 2506.05314 and open-unlearning for the dual step; the forget loss is EUPMU's here,
    so that the two differ in the constraint alone.
    """
    batch_losses = forget_and_retain(losses)

    def init(params, batches):
        del batches
        return PduState(jnp.ones([]), optimizer.init(params))

    def step(params, state, batch):
        def objective(params):
            losses = batch_losses(params, batch)
            return losses.forget + state.multiplier * losses.retain, losses

        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params)
        params, optimizer_state = descend(optimizer, grads, state.optimizer_state, params)
        multiplier = jnp.maximum(0.0, state.multiplier + dual_rate * (losses.retain - bound))
        seen = record(losses.forget, losses.retain, state.multiplier)
        return params, PduState(multiplier, optimizer_state), seen

    return Method(init, step)
