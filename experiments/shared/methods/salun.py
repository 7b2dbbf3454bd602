"""SalUn: scalarisation on the weights that matter most to the forget set."""

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import LossFunctions, Method, forget_and_retain, shares, weighted


def salun(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    weight: jax.Array | float,
    kept_share: float = 0.5,
) -> Method:
    r"""Descends (U + weight R) / (1 + weight) on the salient weights alone.

    The mask keeps the `kept_share` of weights with the largest gradient of the training loss at the
    original parameters, over the whole forget set. It is applied to the optimiser's updates: masked weights
    do not move by momentum or weight decay either.

    Source: Fan et al., arXiv 2310.12508, equations 3 to 5.
    """

    def init(params, batches):
        def add(total, batch):
            grads = jax.grad(lambda p: losses.training(p, batch.forget).mean())(params)
            return jax.tree.map(jnp.add, total, grads), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)
        sizes = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(total)])
        threshold = jnp.quantile(sizes, 1 - kept_share)
        mask = jax.tree.map(lambda leaf: jnp.abs(leaf) >= threshold, total)
        return mask, optimizer.init(params)

    def update(updates, state, params=None):
        mask, inner_state = state
        updates, inner_state = optimizer.update(updates, inner_state, params)
        return jax.tree.map(lambda m, u: jnp.where(m, u, 0), mask, updates), (mask, inner_state)

    salient = optax.GradientTransformation(optimizer.init, update)
    return Method(init, weighted(forget_and_retain(losses), salient, lambda batch: shares(weight)).step)
