"""A linear layer that low-rank adapters can be added to, split over a mesh by its name."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.shared.models.lora import Adapter, low_rank
from experiments.shared.models.sharding import MATRICES, gathered


class Linear(nnx.Module):
    """y = x W^T + b + sum over the adapters of scale x A^T B^T, with W [outputs, inputs]."""

    def __init__(self, name: str, inputs: int, outputs: int, bias: bool, dtype: Any, rngs: nnx.Rngs):
        self.name = name
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (outputs, inputs), dtype) / inputs**0.5)
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: jax.Array, adapters: Sequence[Adapter]) -> jax.Array:
        y = x @ gathered(self.weight[...], MATRICES.get(self.name, P())).T
        if self.bias is not None:
            y = y + self.bias[...]
        return y + low_rank(adapters, self.name, x)
