"""GDR-GMA: two-sided rectified gradients, weighted by how far the retain loss is from a target."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.shared.methods.method import (
    LossFunctions,
    Method,
    Params,
    ascent_and_retain,
    descend,
    record,
)
from experiments.shared.methods.projection import without_conflict


class GdrGmaState(NamedTuple):
    """The last forget gradients of the output's bias [bank, classes], steps taken, the optimiser's state."""

    bank: jax.Array
    taken: jax.Array
    optimizer_state: optax.OptState


def gdr_gma(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    output_bias: Callable[[Params], Any],
    target: jax.Array | float,
    sharpness: float = 100.0,
) -> Method:
    """Descends (1 - w) g_r' + w g_f', w = sigmoid(-sharpness (R - target)), U = -training(forget).

    g_r' and g_f' are the gradients, tensor by tensor, each projected off the other's original where
    they conflict. The bank holds the output bias's g_f for one pass over the forget set; once it is
    full, that bias's g_f' is also projected off the mean of those banked that it conflicts with.
    `output_bias` picks that leaf out of the parameters, or out of a tree like them.

    Source: Lin et al., "GDR-GMA", ACM Multimedia 2024, with the settings of their code, which
    projects the second gradient along the first's projection; we follow the mutual form.
    """
    grads_fn = eu.forget_and_retain_grads(ascent_and_retain(losses))

    def init(params, batches):
        bias = output_bias(params)
        bank = jnp.zeros((len(batches.progress), bias.size), bias.dtype)
        return GdrGmaState(bank, jnp.zeros([], jnp.int32), optimizer.init(params))

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        forget = jax.tree.map(without_conflict, forget_grads, retain_grads)
        retain = jax.tree.map(without_conflict, retain_grads, forget_grads)

        size = len(state.bank)
        bank = state.bank.at[state.taken % size].set(output_bias(forget_grads))
        bias = output_bias(forget)
        conflicting = (bank @ bias < 0) & (state.taken >= size)
        mean = jnp.sum(jnp.where(conflicting[:, None], bank, 0), 0) / jnp.maximum(conflicting.sum(), 1)
        forget = with_leaf(forget, output_bias, without_conflict(bias, mean))

        share = jax.nn.sigmoid(-sharpness * (losses.retain - target))
        grads = jax.tree.map(lambda r, f: (1 - share) * r + share * f, retain, forget)
        params, optimizer_state = descend(optimizer, grads, state.optimizer_state, params)
        seen = record(*losses, (1 - share) / share)
        return params, GdrGmaState(bank, state.taken + 1, optimizer_state), seen

    return Method(init, step)


def with_leaf(tree: Any, pick: Callable[[Any], Any], leaf: jax.Array) -> Any:
    """`tree` with another leaf in the place that `pick` picks."""
    leaves, structure = jax.tree.flatten(tree)
    # Picked out of a tree of numbers, the leaf's place is the number.
    leaves[pick(jax.tree.unflatten(structure, range(len(leaves))))] = leaf
    return jax.tree.unflatten(structure, leaves)
