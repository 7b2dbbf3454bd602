"""Forget and retain losses to build `Losses` from: a value for each example, with masks.

A forget loss is minimised, so it is low when the example is forgotten. For classification logits are [B, C],
labels [B] and mask [B]. For sequences logits are [B, T, V], labels [B, T] and mask [B, T], and
logits[:, t] predict labels[:, t]: shift them yourself. A mask is True where an entry counts. Where it is
False, logits may be NaN and labels anything (-100, say): neither value nor gradient sees them. The value of
an example of which nothing counts is NaN, not zero: leave it out with `masked_mean`. All is computed in
float32 or wider, and in nats.
"""

from eupmu_jax.objectives.diffusion import (
    denoising_rise,
    noise_prediction_redirect,
    velocity_prediction_redirect,
)
from eupmu_jax.objectives.labels import (
    cross_entropy,
    gradient_ascent,
    kl_to_reference,
    kl_to_uniform,
    unlikelihood,
    wrong_labels,
)
from eupmu_jax.objectives.language import npo, sequence_log_probability, simnpo
from eupmu_jax.objectives.masks import masked_mean

__all__ = [
    "cross_entropy",
    "denoising_rise",
    "gradient_ascent",
    "kl_to_reference",
    "kl_to_uniform",
    "masked_mean",
    "noise_prediction_redirect",
    "npo",
    "sequence_log_probability",
    "simnpo",
    "unlikelihood",
    "velocity_prediction_redirect",
    "wrong_labels",
]
