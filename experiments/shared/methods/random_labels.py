"""Random labels by linear scalarisation: EUPMU's losses under a weight that nothing observed moves."""

import jax.numpy as jnp
import optax

from experiments.shared.methods.method import Apply, Method, random_label_losses, shares, weighted


def random_labels(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    weight,
    log_losses: bool = False,
    ramped: bool = False,
) -> Method:
    """Descends (U + weight R) / (1 + weight), or the same of log U and log R.

    `ramped` lets the weight rise linearly from 1 to `weight` over the run: forget first, repair later,
    as a growing multiplier does, but blindly.

    Source: Golatkar et al., arXiv 1911.04933, for the labels; standard for the weight; ours for the ramp.
    """
    at = lambda progress: 1 + (weight - 1) * progress if ramped else weight
    space = safe_log if log_losses else lambda loss: loss
    return weighted(random_label_losses(apply), optimizer, lambda batch: shares(at(batch.progress)), space)


def safe_log(loss):
    """A loss that underflows to 0 has no logarithm, and nothing left to gain."""
    return jnp.log(jnp.maximum(loss, jnp.finfo(loss.dtype).tiny))
