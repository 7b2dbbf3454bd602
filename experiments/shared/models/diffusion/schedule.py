"""The cosine schedule in continuous time, and what a prediction of noise or of velocity says.

x_t = alpha_t x_0 + sigma_t noise, alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2), for t from 0 (clean) to 1
(noise); the velocity is alpha_t noise - sigma_t x_0 (Salimans and Ho, arXiv 2202.00512).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Prediction = Literal["velocity", "noise"]
"""What a network predicts."""

# Where there is no signal a prediction of the noise says nothing of the clean image.
LATEST = 0.999


class Rates(NamedTuple):
    """alpha and sigma, of the shape of t."""

    signal: jax.Array
    noise: jax.Array


def rates(t: jax.Array) -> Rates:
    return Rates(jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t))


def rates_like(t: jax.Array, x: jax.Array) -> Rates:
    """Those of t [] or [B], with axes of size 1 for the others of x [B, ...]."""
    return rates(jnp.reshape(t, jnp.shape(t) + (1,) * (x.ndim - 1)))


def noised(clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t of clean images [B, ...], t [] or [B]."""
    signal_rate, noise_rate = rates_like(t, clean)
    return signal_rate * clean + noise_rate * noise


def target(kind: Prediction, clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """What the network should predict."""
    signal_rate, noise_rate = rates_like(t, clean)
    return noise if kind == "noise" else signal_rate * noise - noise_rate * clean


def clean_of(kind: Prediction, predicted: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """The clean image that a prediction at x_t says, in [-1, 1]."""
    signal_rate, noise_rate = rates_like(t, x)
    clean = (
        (x - noise_rate * predicted) / signal_rate
        if kind == "noise"
        else signal_rate * x - noise_rate * predicted
    )
    return jnp.clip(clean, -1, 1)


def stratified_times(key: jax.Array, amount: int) -> jax.Array:
    """So many t in (0, LATEST), one in each of as many equal parts, in random order."""
    part, within = jax.random.split(key)
    return LATEST * (jax.random.permutation(part, amount) + jax.random.uniform(within, (amount,))) / amount
