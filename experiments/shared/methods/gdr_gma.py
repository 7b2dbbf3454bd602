"""GDR-GMA: two-sided rectified gradients, weighted by how far the retain loss is from a target."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.shared.methods.method import Apply, Method, ascent_losses, descend, record
from experiments.shared.methods.projection import without_conflict


class GdrGmaState(NamedTuple):
    """The last forget gradients of the output's bias [bank, classes], steps taken, the optimiser's state."""

    bank: jax.Array
    taken: jax.Array
    optimizer_state: Any


def gdr_gma(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    target,
    sharpness: float = 100.0,
) -> Method:
    """Descends (1 - w) g_r' + w g_f', w = sigmoid(-sharpness (R - target)), U = -CE(forget).

    g_r' and g_f' are the gradients, tensor by tensor, each projected off the other's original where
    they conflict. The bank holds the output bias's g_f for one pass over the forget set; once it is
    full, that bias's g_f' is also projected off the mean of those banked that it conflicts with.

    Source: Lin et al., "GDR-GMA", ACM Multimedia 2024, with the settings of their code, which
    projects the second gradient along the first's projection; we follow the mutual form.
    """
    grads_fn = eu.forget_and_retain_grads(ascent_losses(apply))

    def init(params, batches):
        logits = jax.eval_shape(apply, params, batches.forget.x[0])
        bias = jax.tree.leaves(params)[output_bias(params, logits.shape[-1])]
        bank = jnp.zeros((len(batches.wrong), bias.size), bias.dtype)
        return GdrGmaState(bank, jnp.zeros([], jnp.int32), optimizer.init(params))

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        forget = jax.tree.map(without_conflict, forget_grads, retain_grads)
        retain = jax.tree.map(without_conflict, retain_grads, forget_grads)

        size, classes = state.bank.shape
        place = output_bias(params, classes)
        bank = state.bank.at[state.taken % size].set(jax.tree.leaves(forget_grads)[place])
        leaves = jax.tree.leaves(forget)
        conflicting = (bank @ leaves[place] < 0) & (state.taken >= size)
        mean = jnp.sum(jnp.where(conflicting[:, None], bank, 0), 0) / jnp.maximum(conflicting.sum(), 1)
        leaves[place] = without_conflict(leaves[place], mean)
        forget = jax.tree.unflatten(jax.tree.structure(forget), leaves)

        share = jax.nn.sigmoid(-sharpness * (losses.retain - target))
        grads = jax.tree.map(lambda r, f: (1 - share) * r + share * f, retain, forget)
        params, optimizer_state = descend(optimizer, grads, state.optimizer_state, params)
        seen = record(*losses, (1 - share) / share)
        return params, GdrGmaState(bank, state.taken + 1, optimizer_state), seen

    return Method(init, step)


def output_bias(params: Any, classes: int) -> int:
    """The place among the leaves of the last one with one number for each class."""
    return max(i for i, leaf in enumerate(jax.tree.leaves(params)) if leaf.shape == (classes,))
