"""FAMO: softmax weights over log losses, moved by the decreases observed after a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import LossFunctions, Method, descend, forget_and_retain, record


class FamoState(NamedTuple):
    """Logits of the two weights [retain, forget], their optimiser's state, and the inner one's."""

    logits: jax.Array
    weight_state: optax.OptState
    optimizer_state: optax.OptState


def famo(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    weight_rate: jax.Array | float,
    decay: float = 1e-5,
) -> Method:
    r"""Descends sum_k z_k log L_k / sum_k (z_k / L_k), z = softmax(logits), L = (R, U).

    After the step both losses are evaluated again on the batch, and Adam moves the logits along
    J^T (log L_t - log L_{t+1}), J the softmax's Jacobian, plus decay times the logits: the loss that
    has fallen least gains weight.

    Source: Liu et al., arXiv 2306.03792, algorithm 1.
    """
    batch_losses, offset = forget_and_retain(losses), 1e-8
    weight_optimizer = optax.chain(optax.add_decayed_weights(decay), optax.adam(weight_rate))

    def log_losses(params, batch):
        losses = batch_losses(params, batch)
        return jnp.log(jnp.stack([losses.retain, losses.forget]) + offset), losses

    def init(params, batches):
        del batches
        logits = jnp.zeros(2, jax.tree.leaves(params)[0].dtype)
        return FamoState(logits, weight_optimizer.init(logits), optimizer.init(params))

    def step(params, state, batch):
        z, pull_softmax = jax.vjp(jax.nn.softmax, state.logits)

        def objective(params):
            logs, losses = log_losses(params, batch)
            scale = jax.lax.stop_gradient(jnp.sum(z * jnp.exp(-logs)))
            return jnp.sum(z * logs) / scale, (logs, losses)

        grads, (before, losses) = jax.grad(objective, has_aux=True)(params)
        params, optimizer_state = descend(optimizer, grads, state.optimizer_state, params)
        after, _ = log_losses(params, batch)
        (slope,) = pull_softmax(before - after)
        updates, weight_state = weight_optimizer.update(slope, state.weight_state, state.logits)
        logits = jnp.asarray(optax.apply_updates(state.logits, updates))
        seen = record(losses.forget, losses.retain, z[0] / z[1])
        return params, FamoState(logits, weight_state, optimizer_state), seen

    return Method(init, step)
