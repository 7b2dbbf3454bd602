"""A decoder language model as pure functions: shapes, shardings and the loss of a batch of tokens."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

FSDP, TENSOR = "fsdp", "tensor"


class Size(NamedTuple):
    """The shape of a decoder with grouped-query attention and gated feed-forward layers."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = 32_000

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SIZES = {
    "0.1B": Size(layers=12, width=768, heads=6, kv_heads=6, hidden=2048),
    "1B": Size(layers=22, width=2048, heads=16, kv_heads=4, hidden=5632),
    "7B": Size(layers=32, width=4096, heads=32, kv_heads=32, hidden=11008),
    "70B": Size(layers=80, width=8192, heads=64, kv_heads=8, hidden=28672),
}
"""Heads are 128 wide, what a TPU's registers hold; 7B and 70B are the shapes of Llama 2."""


class Weight(NamedTuple):
    """Shape and sharding of one array of parameters."""

    shape: tuple[int, ...]
    spec: P


def weights(size: Size) -> dict[str, Any]:
    """Shapes and shardings: blocks stacked over layers, each matrix split over both axes of the mesh."""
    queries, pairs = size.heads * size.head_width, size.kv_heads * size.head_width
    column, row = P(None, FSDP, TENSOR), P(None, TENSOR, FSDP)
    matrices = {
        "query": ((size.width, queries), column),
        "key": ((size.width, pairs), column),
        "value": ((size.width, pairs), column),
        "out": ((queries, size.width), row),
        "gate": ((size.width, size.hidden), column),
        "up": ((size.width, size.hidden), column),
        "down": ((size.hidden, size.width), row),
    }
    blocks = {name: Weight((size.layers, *shape), spec) for name, (shape, spec) in matrices.items()}
    norm = Weight((size.layers, size.width), P())
    return {
        "embed": Weight((size.vocabulary, size.width), P(TENSOR, FSDP)),
        "blocks": blocks | {"attention_norm": norm, "feed_forward_norm": norm},
        "norm": Weight((size.width,), P()),
        "head": Weight((size.width, size.vocabulary), P(FSDP, TENSOR)),
    }


def is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def parameter_shapes(size: Size, dtype: Any = jnp.bfloat16) -> Any:
    """The parameters as ShapeDtypeStructs."""
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), weights(size), is_leaf=is_weight)


def parameter_specs(size: Size) -> Any:
    """The parameters' PartitionSpecs on a mesh with the axes "fsdp" and "tensor"."""
    return jax.tree.map(lambda w: w.spec, weights(size), is_leaf=is_weight)


def count_parameters(size: Size) -> int:
    return sum(math.prod(w.shape) for w in jax.tree.leaves(weights(size), is_leaf=is_weight))


def initial_parameters(size: Size, key: jax.Array, dtype: Any = jnp.bfloat16) -> Any:
    """Normal matrices of variance 1 / inputs, and norms of 1."""

    def leaf(key, weight):
        if weight.spec == P():
            return jnp.ones(weight.shape, dtype)
        return (jax.random.normal(key, weight.shape) / weight.shape[-2] ** 0.5).astype(dtype)

    leaves, structure = jax.tree.flatten(weights(size), is_leaf=is_weight)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [leaf(*pair) for pair in zip(keys, leaves, strict=True)])


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """`x` with that sharding, where there is a mesh to shard over."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P(*spec))


def gathered(weight: jax.Array, *spec: Any) -> jax.Array:
    """A matrix as it is stored, then whole along "fsdp"; its gradient takes the same way back."""
    return constrain(constrain(weight, *spec), *(None if axis == FSDP else axis for axis in spec))


def wide(x: jax.Array) -> jax.Array:
    """In float32 at least: softmaxes, norms and losses are not taken in bfloat16."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square normalisation."""
    y = wide(x)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rotated(x: jax.Array) -> jax.Array:
    """Rotary position embedding of x [batch, time, heads, width]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = (jnp.arange(x.shape[1])[:, None] * frequencies).astype(wide(x).dtype)[:, None]
    first, second = wide(x[..., :half]), wide(x[..., half:])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def attention(
    size: Size, weight: Callable[[str], jax.Array], x: jax.Array, chunks: int, unroll: bool
) -> jax.Array:
    """Causal grouped-query attention of x [batch, time, width], heads split over "tensor".

    The scores exist for one of `chunks` parts of the queries at once, and are recomputed for the gradient.
    """

    def heads(name, count):
        y = constrain(x @ weight(name), FSDP, None, TENSOR)
        return constrain(y.reshape(*y.shape[:2], count, size.head_width), FSDP, None, TENSOR, None)

    query, key = rotated(heads("query", size.heads)), rotated(heads("key", size.kv_heads))
    value = heads("value", size.kv_heads)
    query = query.reshape(*x.shape[:2], size.kv_heads, -1, size.head_width)
    query = constrain(query, FSDP, None, TENSOR, None, None)

    @jax.checkpoint
    def mixed(_, part):
        query, times = part
        scores = wide(jnp.einsum("btkgw,bskw->bkgts", query, key)) / size.head_width**0.5
        visible = times[:, None] >= jnp.arange(x.shape[1])
        shares = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(x.dtype)
        return None, jnp.einsum("bkgts,bskw->btkgw", shares, value)

    parts = in_parts(query, chunks), jnp.arange(x.shape[1]).reshape(chunks, -1)
    _, y = jax.lax.scan(mixed, None, parts, unroll=unroll)
    y = constrain(jnp.moveaxis(y, 0, 1).reshape(*x.shape[:2], -1), FSDP, None, TENSOR)
    return y @ weight("out")


def in_parts(x: jax.Array, parts: int) -> jax.Array:
    """[batch, time, ...] as [parts, batch, time / parts, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)


def make_block(size: Size, chunks: int, unroll: bool):
    """One layer as (x, its weights) -> (x, None), for a scan; recomputed in the backward pass."""
    specs = weights(size)["blocks"]

    @jax.checkpoint
    def block(x, block):
        weight = lambda name: gathered(block[name], *specs[name].spec[1:])
        # What is kept for the backward pass, one x a layer, is split over both axes.
        x = constrain(x, FSDP, TENSOR, None)
        y = constrain(normed(x, block["attention_norm"]), FSDP, None, None)
        x = x + constrain(attention(size, weight, y, chunks, unroll), FSDP, TENSOR, None)
        y = constrain(normed(x, block["feed_forward_norm"]), FSDP, None, None)
        hidden = lambda name: constrain(y @ weight(name), FSDP, None, TENSOR)
        x = x + constrain((jax.nn.silu(hidden("gate")) * hidden("up")) @ weight("down"), FSDP, TENSOR, None)
        return constrain(x, FSDP, TENSOR, None), None

    return block


def next_token_losses(size: Size, params: Any, tokens: jax.Array, chunks: int = 4, unroll: bool = False):
    """Cross-entropy in nats of tokens[:, 1:] given what stands before: of tokens [batch, time + 1], the mean
    of each sequence [batch].

    Scores and logits exist for one of `chunks` parts of the time at once, split over heads and vocabulary.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = constrain(params["embed"][inputs], FSDP, TENSOR, None)
    x, _ = jax.lax.scan(make_block(size, chunks, unroll), x, params["blocks"], unroll=unroll)
    x = constrain(normed(x, params["norm"]), FSDP, None, None)
    head = gathered(params["head"], FSDP, TENSOR)

    @jax.checkpoint
    def summed(total, part):
        x, targets = part
        logits = constrain(wide(x @ head), FSDP, None, TENSOR)
        picked = jnp.sum(jnp.where(targets[..., None] == jnp.arange(size.vocabulary), logits, 0), -1)
        return total + jnp.sum(jax.nn.logsumexp(logits, -1) - picked, -1), None

    none = jnp.zeros(len(tokens), wide(x).dtype)
    total, _ = jax.lax.scan(summed, none, (in_parts(x, chunks), in_parts(targets, chunks)), unroll=unroll)
    return total / targets.shape[1]
