"""The transformer of diffusion models: layers that a condition modulates, all in one scan."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.shared.models.linear import Linear
from experiments.shared.models.lora import Adapter
from experiments.shared.models.sharding import FSDP, TENSOR, constrain

MLP_RATIO, FREQUENCIES = 4, 32
# Of t in [0, 1]: the shortest wave is a few steps of a sampler.
FASTEST = 100.0


def normalised(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 along the last axis."""
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5)


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Tokens [B, T, width], normalised, then scaled and shifted by each example's [B, width]."""
    return normalised(x) * (1 + scale[:, None]) + shift[:, None]


def waves(t: jax.Array) -> jax.Array:
    """Sines and cosines of times [B], [B, 2 FREQUENCIES]."""
    angles = t[:, None] * jnp.geomspace(1.0, FASTEST, FREQUENCIES)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class Zeros(Linear):
    """A linear layer that starts from 0, so that what it feeds starts from doing nothing."""

    def __init__(self, name: str, inputs: int, outputs: int, rngs: nnx.Rngs):
        super().__init__(name, inputs, outputs, True, jnp.float32, rngs)
        self.weight[...] = jnp.zeros_like(self.weight[...])


def linear(name: str, inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    return Linear(name, inputs, outputs, True, jnp.float32, rngs)


class Labels(nnx.Module):
    """The sum of a vector for each label; a label of -1 asks for nothing, and has the vector 0."""

    def __init__(self, sizes: tuple[int, ...], width: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.3 * jax.random.normal(rngs.params(), (sum(sizes), width)))
        self.sizes = sizes

    def __call__(self, labels: jax.Array) -> jax.Array:
        """[B, width] of labels [B, attributes]."""
        columns = zip(labels.T, self.sizes, strict=True)
        hot = jnp.concatenate([jax.nn.one_hot(column, size) for column, size in columns], -1)
        return hot @ self.weight[...]


class Condition(nnx.Module):
    """The time, and the vector of what is asked for, as one vector [B, width] that modulates the layers."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.time_up = linear("time_up", 2 * FREQUENCIES, width, rngs)
        self.time_down = linear("time_down", width, width, rngs)

    def __call__(self, t: jax.Array, asked: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(self.time_up(waves(t), ()))
        return jax.nn.silu(self.time_down(hidden, ()) + asked)


class Attention(nnx.Module):
    """Every token sees all others."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.q_proj = linear("q_proj", width, width, rngs)
        self.k_proj = linear("k_proj", width, width, rngs)
        self.v_proj = linear("v_proj", width, width, rngs)
        self.o_proj = linear("o_proj", width, width, rngs)
        self.heads = heads

    def __call__(self, x: jax.Array, adapters: Sequence[Adapter]) -> jax.Array:
        def split(y):
            y = constrain(y, FSDP, None, TENSOR)
            return constrain(y.reshape(*y.shape[:2], self.heads, -1), FSDP, None, TENSOR, None)

        query, key, value = (split(p(x, adapters)) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = jax.nn.dot_product_attention(query, key, value)
        return self.o_proj(constrain(y.reshape(x.shape), FSDP, None, TENSOR), adapters)


class MLP(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.up_proj = linear("up_proj", width, MLP_RATIO * width, rngs)
        self.down_proj = linear("down_proj", MLP_RATIO * width, width, rngs)

    def __call__(self, x: jax.Array, adapters: Sequence[Adapter]) -> jax.Array:
        y = constrain(self.up_proj(x, adapters), FSDP, None, TENSOR)
        return self.down_proj(jax.nn.gelu(y), adapters)


class Layer(nnx.Module):
    """Attention and an MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.self_attn = Attention(width, heads, rngs)
        self.mlp = MLP(width, rngs)
        self.modulation = Zeros("modulation", width, 6 * width, rngs)

    def __call__(self, x: jax.Array, condition: jax.Array, adapters: Sequence[Adapter]) -> jax.Array:
        parts = jnp.split(self.modulation(condition, adapters), 6, -1)
        for block, (shift, scale, gate) in ((self.self_attn, parts[:3]), (self.mlp, parts[3:])):
            x = x + gate[:, None] * block(modulated(x, shift, scale), adapters)
        return constrain(x, FSDP, None, None)


def stacked(layers: int, width: int, heads: int, rngs: nnx.Rngs) -> Layer:
    """So many layers as one, whose parameters have a leading axis of layers."""
    return nnx.split_rngs(splits=layers)(nnx.vmap(lambda rngs: Layer(width, heads, rngs)))(rngs)


def through(layers: Layer, x: jax.Array, condition: jax.Array, adapters: Sequence[Adapter]) -> jax.Array:
    """Tokens [B, T, width] after all of the stacked layers."""
    graph, state = nnx.split(layers)

    def step(x, inputs):
        layer, weights = inputs
        own = [adapter._replace(weights=w) for adapter, w in zip(adapters, weights, strict=True)]
        return nnx.merge(graph, layer)(x, condition, own), None

    return jax.lax.scan(step, x, (state, [adapter.weights for adapter in adapters]))[0]


def projection_shapes(width: int) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every projection of a layer."""
    hidden = MLP_RATIO * width
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    return attention | {"up_proj": (hidden, width), "down_proj": (width, hidden)}
