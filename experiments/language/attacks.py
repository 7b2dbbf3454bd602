"""Attempts to bring back what was forgotten: fine-tuning on a part of it or on prose, and fewer bits."""

from collections.abc import Callable
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax.evaluation import relearning_curve
from experiments.language.losses import known
from experiments.language.measures import seen_of
from experiments.language.texts import Rows
from experiments.shared.models.llama.config import Config
from experiments.shared.models.llama.model import Params

FORMATS = {
    "INT8": gguf.GGMLQuantizationType.Q8_0,
    "INT4": gguf.GGMLQuantizationType.Q4_1,
    "INT4, symmetric": gguf.GGMLQuantizationType.Q4_0,
}


def quantised(params: Params, bits: str) -> Params:
    """All matrices as they come back from a GGUF file of that format; norms stay as they are."""

    def of(path, leaf):
        value = np.asarray(leaf, np.float32)
        if "norm" in path[-2].key:
            return leaf
        packed = gguf.quantize(value.reshape(-1, value.shape[-1]), FORMATS[bits])
        return jnp.asarray(gguf.dequantize(packed, FORMATS[bits]).reshape(value.shape))

    return jax.tree_util.tree_map_with_path(of, params)


def fine_tuning(config: Config, rate: float, every: int) -> Callable[[Params, Rows, Rows], Any]:
    """attack(params, batches [steps, B, T], watched) -> nats and hits of the watched rows, every so often.

    The batches hold some of what was forgotten, or text that has nothing to do with it.
    """

    @jax.jit
    def attack(params: Params, batches: Rows, watched: Rows):
        loss_fn = lambda params, rows: known(config, {"base": params, "adapter": {}}, rows)
        score_fn = lambda params: seen_of(config, params, watched.tokens)
        return relearning_curve(loss_fn, score_fn, params, batches, optax.adam(rate), every)

    return attack
