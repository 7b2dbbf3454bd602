"""A diffusion network as pure functions of its parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from experiments.shared.models.lora import Adapter, LowRank, initial_weights

Params = dict[str, Any]

Predict = Callable[[jax.Array, jax.Array], jax.Array]
"""(x [B, H, W, C], t [B]) -> the prediction, like x."""


class Network(NamedTuple):
    """What training, sampling and unlearning know of a network.

    Attributes:
      init: key -> params, a nested dict.
      embed: (params, labels [B, attributes]) -> what is asked for, [B, width]; -1 asks for nothing.
      predict: (params, x [B, H, W, C], t [B], asked [B, width], adapters) -> noise or velocity, like x.
      new_adapter: (key, rank) -> low-rank weights on the attention's projections, which change nothing yet.
    """

    init: Callable[[jax.Array], Params]
    embed: Callable[[Params, jax.Array], jax.Array]
    predict: Callable[..., jax.Array]
    new_adapter: Callable[[jax.Array, int], dict[str, LowRank]]


def make_network(make: Callable[[nnx.Rngs], Any]) -> Network:
    """Of a module such as `dit.DiT` or `hybrid.Hybrid`, made from its random numbers."""
    module = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
    graph, (layers, shapes) = nnx.graphdef(module), module.adaptable

    def predict(
        params: Params, x: jax.Array, t: jax.Array, asked: jax.Array, adapters: Sequence[Adapter] = ()
    ) -> jax.Array:
        return nnx.merge(graph, params)(x, t, asked, adapters)

    return Network(
        init=lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)))),
        embed=lambda params, labels: nnx.merge(graph, params).embed(labels),
        predict=predict,
        new_adapter=lambda key, rank: initial_weights(shapes, layers, key, rank, ATTENTION),
    )


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
