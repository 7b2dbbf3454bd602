"""SalUn: random labels on the weights that matter most to the forget set."""

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import (
    Apply,
    Method,
    cross_entropy,
    random_label_losses,
    shares,
    weighted,
)


def salun(
    apply: Apply, optimizer: optax.GradientTransformation, *, weight, kept_share: float = 0.5
) -> Method:
    r"""Descends (U + weight R) / (1 + weight) on the salient weights alone.

    The mask keeps the `kept_share` of weights with the largest |grad CE(forget)| at the original
    parameters, over the whole forget set. It is applied to the optimiser's updates: masked weights
    do not move by momentum or weight decay either.

    Source: Fan et al., arXiv 2310.12508, equations 3 to 5.
    """

    def init(params, batches):
        def add(total, batch):
            grads = jax.grad(lambda p: cross_entropy(apply, p, *batch.forget))(params)
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
    return Method(init, weighted(random_label_losses(apply), salient, lambda batch: shares(weight)).step)
