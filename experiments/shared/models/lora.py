"""Low-rank adapters (Hu et al., arXiv 2106.09685): W + scale B A on chosen projections of every layer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Shapes = Mapping[str, tuple[int, int]]
"""(outputs, inputs) of every projection of a layer that can have an adapter."""


class LowRank(NamedTuple):
    """B A: down [rank, inputs], which PEFT calls lora_A, and up [outputs, rank], lora_B."""

    down: jax.Array
    up: jax.Array


class Adapter(NamedTuple):
    """What is added to a model.

    Attributes:
      scale: the factor of B A, PEFT's lora_alpha / r. It is not trained: train the weights.
      weights: the LowRank of each projection by its name, with a leading axis of layers.
    """

    scale: float | jax.Array
    weights: Mapping[str, LowRank]


def low_rank(adapters: Sequence[Adapter], name: str, x: jax.Array) -> jax.Array | float:
    """sum of scale x A^T B^T over the adapters that have that projection."""
    parts = [(adapter.scale, adapter.weights[name]) for adapter in adapters if name in adapter.weights]
    return sum(scale * ((x @ w.down.T.astype(x.dtype)) @ w.up.T.astype(x.dtype)) for scale, w in parts)


def initial_weights(
    shapes: Shapes,
    layers: int,
    key: jax.Array,
    rank: int,
    names: Sequence[str] = ("q_proj", "v_proj"),
    dtype: Any = jnp.float32,
) -> dict[str, LowRank]:
    """Weights that change nothing yet: A is normal of variance 1 / inputs, B is 0."""
    if unknown := set(names) - shapes.keys():
        raise ValueError(f"no such projections: {', '.join(sorted(unknown))}; there are {', '.join(shapes)}")
    weights = {}
    for name, own in zip(names, jax.random.split(key, len(names)), strict=True):
        outputs, inputs = shapes[name]
        down = jax.random.normal(own, (layers, rank, inputs), dtype) / inputs**0.5
        weights[name] = LowRank(down, jnp.zeros((layers, outputs, rank), dtype))
    return weights


def merged(params: Mapping[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The parameters of one model that computes the same: W + sum of scale B A."""

    def of(group):
        def weight(name, value):
            total = value.astype(jnp.promote_types(value.dtype, jnp.float32))
            for scale, weights in adapters:
                if name in weights:
                    total += scale * jnp.einsum("lor,lri->loi", weights[name].up, weights[name].down)
            return total.astype(value.dtype)

        return {
            name: {**projection, "weight": weight(name, projection["weight"])}
            if name.endswith("_proj")
            else projection
            for name, projection in group.items()
        }

    layers = {
        **params["layers"],
        "self_attn": of(params["layers"]["self_attn"]),
        "mlp": of(params["layers"]["mlp"]),
    }
    return {**params, "layers": layers}
