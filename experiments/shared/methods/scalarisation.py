"""Linear scalarisation: both losses under a weight that nothing observed moves."""

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import LossFunctions, Method, forget_and_retain, shares, weighted


def scalarisation(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    weight: jax.Array | float,
    log_losses: bool = False,
    ramped: bool = False,
) -> Method:
    """Descends (U + weight R) / (1 + weight), or the same of log U and log R.

    `ramped` lets the weight rise linearly from 1 to `weight` over the run: forget first, repair later,
    as a growing multiplier does, but blindly.
    """
    at = lambda progress: 1 + (weight - 1) * progress if ramped else weight
    space = safe_log if log_losses else lambda loss: loss
    return weighted(forget_and_retain(losses), optimizer, lambda batch: shares(at(batch.progress)), space)


def safe_log(loss: jax.Array) -> jax.Array:
    """A loss that underflows to 0 has no logarithm, and nothing left to gain."""
    return jnp.log(jnp.maximum(loss, jnp.finfo(loss.dtype).tiny))
