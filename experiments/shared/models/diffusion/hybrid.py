"""Convolutions, as matrix products, at full and half size around transformer layers at a quarter of it."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.shared.models.convolution import windows
from experiments.shared.models.diffusion.blocks import (
    Condition,
    Labels,
    Zeros,
    linear,
    normalised,
    projection_shapes,
    stacked,
    through,
)
from experiments.shared.models.diffusion.dit import from_patches, in_patches
from experiments.shared.models.linear import Linear
from experiments.shared.models.lora import Adapter

QUARTER = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a hybrid.

    Attributes:
      size, channels: of the square images; the size is a multiple of 4.
      stem: features of a pixel at full size; twice as many at half size.
      width, layers, heads: of the transformer at a quarter; the width is a multiple of the heads.
      labels: how many values each attribute has.
    """

    size: int
    channels: int
    stem: int
    width: int
    layers: int
    heads: int
    labels: tuple[int, ...]

    def __post_init__(self):
        if self.size % QUARTER:
            raise ValueError(f"size must be a multiple of {QUARTER}, got {self.size}")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")


neighbours = partial(windows, size=(3, 3))
"""Each pixel and the eight around it, 0 beyond the edge: [B, H, W, C] as [B, H, W, 9 C]."""


def halved(x: jax.Array) -> jax.Array:
    """Four pixels as one of four times the features."""
    batch, height, width, channels = x.shape
    return in_patches(x, 2).reshape(batch, height // 2, width // 2, 4 * channels)


def doubled(x: jax.Array) -> jax.Array:
    """What `halved` took together."""
    batch, height, width, channels = x.shape
    return from_patches(x.reshape(batch, -1, channels), 2, (batch, 2 * height, 2 * width, channels // 4))


class Residual(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), shifted and scaled by the condition in between."""

    def __init__(self, inputs: int, outputs: int, width: int, rngs: nnx.Rngs):
        self.first = linear("conv", 9 * inputs, outputs, rngs)
        self.second = Zeros("conv", 9 * outputs, outputs, rngs)
        self.modulation = Zeros("modulation", width, 2 * outputs, rngs)
        self.around = linear("conv", inputs, outputs, rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.modulation(condition, ())[:, None, None], 2, -1)
        y = self.first(neighbours(jax.nn.silu(normalised(x))), ())
        y = normalised(y) * (1 + scale) + shift
        y = self.second(neighbours(jax.nn.silu(y)), ())
        return y + (x if self.around is None else self.around(x, ()))


class Hybrid(nnx.Module):
    """The prediction at x_t, [B, size, size, channels]; `embed` makes labels what is asked for."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        stem, width, tokens = config.stem, config.width, (config.size // QUARTER) ** 2
        block = lambda inputs, outputs: Residual(inputs, outputs, width, rngs)
        self.embed_labels = Labels(config.labels, width, rngs)
        self.condition = Condition(width, rngs)
        self.embed_pixels: Linear = linear("embed_pixels", 9 * config.channels, stem, rngs)
        self.full_down, self.half_down = block(stem, stem), block(2 * stem, 2 * stem)
        self.to_half = linear("embed_pixels", 4 * stem, 2 * stem, rngs)
        self.to_quarter = linear("embed_pixels", 8 * stem, width, rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (tokens, width)))
        self.layers = stacked(config.layers, width, config.heads, rngs)
        self.from_quarter = linear("to_pixels", width, 8 * stem, rngs)
        self.from_half = linear("to_pixels", 2 * stem, 4 * stem, rngs)
        self.half_up, self.full_up = block(4 * stem, 2 * stem), block(2 * stem, stem)
        self.to_pixels = Zeros("to_pixels", 9 * stem, config.channels, rngs)
        self.config = config

    def embed(self, labels: jax.Array) -> jax.Array:
        """[B, width] of labels [B, attributes]."""
        return self.embed_labels(labels)

    def __call__(
        self, x: jax.Array, t: jax.Array, asked: jax.Array, adapters: Sequence[Adapter] = ()
    ) -> jax.Array:
        condition = self.condition(t, asked)
        full = self.full_down(self.embed_pixels(neighbours(x), ()), condition)
        half = self.half_down(self.to_half(halved(full), ()), condition)
        quarter = self.to_quarter(halved(half), ())
        tokens = quarter.reshape(len(x), -1, self.config.width) + self.position[...]
        tokens = through(self.layers, tokens, condition, adapters)
        y = doubled(self.from_quarter(tokens.reshape(quarter.shape), ()))
        y = self.half_up(jnp.concatenate([y, half], -1), condition)
        y = doubled(self.from_half(y, ()))
        y = self.full_up(jnp.concatenate([y, full], -1), condition)
        return self.to_pixels(neighbours(jax.nn.silu(normalised(y))), ())

    @property
    def adaptable(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """The number of layers, and the shapes of their projections."""
        return self.config.layers, projection_shapes(self.config.width)
