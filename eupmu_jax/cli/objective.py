"""The losses of a model of classes or tokens, as the command line names them."""

from typing import Any

import jax
import jax.numpy as jnp

from eupmu_jax import objectives
from eupmu_jax.cli.config import Unlearn

# With the paper's temperature, and one from the middle of the range that SimNPO's code searches.
BETA = {"npo": 0.1, "simnpo": 2.5}


def masked_mean(values: jax.Array, rows: Any) -> Any:
    mask = rows.get("mask")
    return objectives.masked_mean(values, mask if mask is None or mask.ndim == 1 else mask.any(-1))


def log_probability(logits: jax.Array, rows: Any) -> jax.Array:
    """Of the class, or of all tokens that count; [B]."""
    if logits.ndim == 2:
        return -objectives.cross_entropy(logits, rows["y"], rows.get("mask"))
    return objectives.sequence_log_probability(logits, rows["y"], rows.get("mask"))


def forget_values(config: Unlearn, logits: jax.Array, rows: Any, key: jax.Array) -> jax.Array:
    """The objective of each example; [B]."""
    labels, mask = rows["y"], rows.get("mask")
    beta = config.beta or BETA.get(config.objective, 0.0)
    match config.objective:
        case "random-labels":
            wrong = objectives.wrong_labels(key, labels, logits.shape[-1], mask)
            return objectives.cross_entropy(logits, wrong, mask)
        case "unlikelihood":
            return objectives.unlikelihood(logits, labels, mask)
        case "gradient-ascent":
            return objectives.gradient_ascent(logits, labels, mask)
        case "kl-to-uniform":
            return objectives.kl_to_uniform(logits, mask)
        case "npo":
            return objectives.npo(log_probability(logits, rows), rows["reference"], beta)
        case "simnpo":
            counts = jnp.ones(labels.shape, bool) if mask is None else mask
            length = counts.reshape(len(labels), -1).sum(-1)
            return objectives.simnpo(log_probability(logits, rows), length, beta)
