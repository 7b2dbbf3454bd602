"""A diffusion transformer (Peebles and Xie, arXiv 2212.09748): patches in, patches out."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.shared.models.diffusion.blocks import (
    Condition,
    Labels,
    Zeros,
    linear,
    modulated,
    projection_shapes,
    stacked,
    through,
)
from experiments.shared.models.lora import Adapter


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a transformer.

    Attributes:
      size, channels: of the square images.
      patch: pixels of a patch's side, which divides the size.
      width, layers, heads: of the transformer; the width is a multiple of the heads.
      labels: how many values each attribute has.
    """

    size: int
    channels: int
    patch: int
    width: int
    layers: int
    heads: int
    labels: tuple[int, ...]

    def __post_init__(self):
        if self.size % self.patch:
            raise ValueError(f"patch ({self.patch}) must divide size ({self.size})")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")


class DiT(nnx.Module):
    """The prediction at x_t, [B, size, size, channels]; `embed` makes labels what is asked for."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, inputs = config.width, config.patch**2 * config.channels
        tokens = (config.size // config.patch) ** 2
        self.embed_labels = Labels(config.labels, width, rngs)
        self.condition = Condition(width, rngs)
        self.embed_pixels = linear("embed_pixels", inputs, width, rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (tokens, width)))
        self.layers = stacked(config.layers, width, config.heads, rngs)
        self.modulation = Zeros("modulation", width, 2 * width, rngs)
        self.to_pixels = Zeros("to_pixels", width, inputs, rngs)
        self.config = config

    def embed(self, labels: jax.Array) -> jax.Array:
        """[B, width] of labels [B, attributes]."""
        return self.embed_labels(labels)

    def __call__(
        self, x: jax.Array, t: jax.Array, asked: jax.Array, adapters: Sequence[Adapter] = ()
    ) -> jax.Array:
        condition = self.condition(t, asked)
        tokens = self.embed_pixels(in_patches(x, self.config.patch), ()) + self.position[...]
        tokens = through(self.layers, tokens, condition, adapters)
        shift, scale = jnp.split(self.modulation(condition, ()), 2, -1)
        return from_patches(self.to_pixels(modulated(tokens, shift, scale), ()), self.config.patch, x.shape)

    @property
    def adaptable(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """The number of layers, and the shapes of their projections."""
        return self.config.layers, projection_shapes(self.config.width)


def in_patches(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] as tokens [B, (H / patch) (W / patch), patch patch C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def from_patches(tokens: jax.Array, patch: int, shape: tuple[int, ...]) -> jax.Array:
    """What `in_patches` took apart."""
    batch, height, width, channels = shape
    x = tokens.reshape(batch, height // patch, width // patch, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)
