"""Random labels by linear scalarisation: EUPMU's losses under one constant weight."""

import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.peers.method import Apply, Method, random_label_losses, weighted


def random_labels(
    apply: Apply, optimizer: optax.GradientTransformation, *, weight, log_losses: bool = False
) -> Method:
    """Descends (U + weight R) / (1 + weight), or the same of log U and log R.

    Source: Golatkar et al., arXiv 1911.04933, for the labels; standard for the weight.
    """

    weights = eu.Losses(1 / (1 + weight), weight / (1 + weight))
    space = safe_log if log_losses else lambda loss: loss
    return weighted(random_label_losses(apply), optimizer, weights, space)


def safe_log(loss):
    """A loss that underflows to 0 has no logarithm, and nothing left to gain."""
    return jnp.log(jnp.maximum(loss, jnp.finfo(loss.dtype).tiny))
