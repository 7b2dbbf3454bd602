"""GDR-GMA: two-sided rectified gradients, weighted by how far the retain loss is from a target."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.peers.method import Apply, Method, ascent_losses, descend, record
from experiments.peers.projection import without_conflict


class GdrGmaState(NamedTuple):
    """The last forget gradients of the last tensor [bank, size], steps taken, and the optimiser's state."""

    bank: jax.Array
    taken: jax.Array
    optimizer_state: Any


def gdr_gma(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    target,
    sharpness: float = 100.0,
    bank_size: int = 8,
) -> Method:
    """Descends (1 - w) g_r' + w g_f', w = sigmoid(-sharpness (R - target)), U = -CE(forget).

    g_r' and g_f' are the gradients, tensor by tensor, each projected off the other's original where
    they conflict. Once the bank is full, the last tensor's g_f' is also projected off the mean of
    those banked gradients that it conflicts with.

    Source: Lin et al., "GDR-GMA", ACM Multimedia 2024, with the settings of their code, which
    projects the second gradient along the first's projection; we follow the mutual form.
    """
    grads_fn = eu.forget_and_retain_grads(ascent_losses(apply))

    def init(params, batches):
        del batches
        last = jax.tree.leaves(params)[-1]
        bank = jnp.zeros((bank_size, last.size), last.dtype)
        return GdrGmaState(bank, jnp.zeros([], jnp.int32), optimizer.init(params))

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        forget = jax.tree.map(without_conflict, forget_grads, retain_grads)
        retain = jax.tree.map(without_conflict, retain_grads, forget_grads)

        bank = state.bank.at[state.taken % bank_size].set(jax.tree.leaves(forget_grads)[-1].ravel())
        *others, last = jax.tree.leaves(forget)
        conflicting = (bank @ last.ravel() < 0) & (state.taken >= bank_size)
        mean = jnp.sum(jnp.where(conflicting[:, None], bank, 0), 0) / jnp.maximum(conflicting.sum(), 1)
        last = without_conflict(last, mean.reshape(last.shape))
        forget = jax.tree.unflatten(jax.tree.structure(forget), [*others, last])

        share = jax.nn.sigmoid(-sharpness * (losses.retain - target))
        grads = jax.tree.map(lambda r, f: (1 - share) * r + share * f, retain, forget)
        params, optimizer_state = descend(optimizer, grads, state.optimizer_state, params)
        seen = record(*losses, (1 - share) / share)
        return params, GdrGmaState(bank, state.taken + 1, optimizer_state), seen

    return Method(init, step)
