"""Rotary position embeddings (Su et al., arXiv 2104.09864), with the scaling of Llama 3."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.models.llama.config import Config


def frequencies(config: Config) -> np.ndarray:
    """Radians per position of each pair, float64 [head_dim / 2]: theta^(-2i / head_dim), then scaled."""
    half = config.head_dim // 2
    plain = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_scaling is None:
        return plain
    scaling = config.rope_scaling
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def rotated(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """x [B, T, H, D] turned by the positions [T].

    The pairs are (i, i + D/2), as in Hugging Face's weights; those of Meta and GGUF pair (2i, 2i + 1).
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    angles = positions[:, None, None].astype(wide.dtype) * jnp.asarray(frequencies, wide.dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(wide, 2, -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
