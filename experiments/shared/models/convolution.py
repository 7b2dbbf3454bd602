"""Convolutions of images as matrix products."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def convolution(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **layout: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for ``nn.Conv(conv_general_dilated=...)``, undilated and in one group.

    On a CPU, XLA compiles a convolution in the body of a loop to code that is some twenty times slower than
    outside of it. Slices and a matrix product are as fast in either place.

    Args:
      images: [B, H, W, C].
      kernel: [h, w, C, D].
      window_strides, padding: as there.
      layout: the other arguments, as flax's nn.Conv passes them by default.
    """
    height, width, _, depth = kernel.shape
    return windows(images, (height, width), window_strides, padding) @ kernel.reshape(-1, depth)


def windows(
    images: jax.Array,
    size: tuple[int, int],
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """What a kernel of that size sees at each of its places: [B, H, W, C] as [B, H', W', h w C]."""
    (height, width), (down, right) = size, strides
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], size, strides, padding)
    images = jnp.pad(images, [(0, 0), *padding, (0, 0)])
    rows = images.shape[1] - height + 1
    columns = images.shape[2] - width + 1
    patches = [
        images[:, i : i + rows : down, j : j + columns : right] for i in range(height) for j in range(width)
    ]
    return jnp.concatenate(patches, -1)
