"""Forget and retain losses to build `Losses` from: a value for each example, with masks.

A forget loss is minimised, so it is low when the example is forgotten. For classification logits are [B, C],
labels [B] and mask [B]. For sequences logits are [B, T, V], labels [B, T] and mask [B, T], and
logits[:, t] predict labels[:, t]: shift them yourself. A mask is True where an entry counts. Where it is
False, logits may be NaN and labels anything (-100, say): neither value nor gradient sees them. The value of
an example of which nothing counts is NaN, not zero: leave it out with `masked_mean`. All is computed in
float32 or wider, and in nats. Where [B, T, V] is too large, `by_token` computes an objective in chunks.

The methods of the literature, by what they minimise; each needs a retain loss beside it, which is
`cross_entropy` to the true labels or a divergence from the original unless the line says otherwise:

- Gradient ascent, and with a retain loss gradient difference: `gradient_ascent`.
- Random labels: `cross_entropy` to `wrong_labels`, drawn anew in each step.
- "I don't know": `cross_entropy` to the tokens of a refusal in place of the answer.
- Unlikelihood: `unlikelihood`.
- Divergence from uniform: `kl_to_uniform`.
- NPO: `npo` of `sequence_log_probability` and of the original's, from `reference_values`.
- SimNPO: `simnpo` of `sequence_log_probability` and the number of tokens.
- RMU: `representation_misdirection` to a random direction; to retain, the same to the original's states.
- Confidence target: `confidence_target` to `unseen_confidence`.
- SalUn and EUPMU of a diffusion model: `noise_prediction_redirect` or `velocity_prediction_redirect` to
  another class; to retain, `denoising_rise`.
- Divergence from the original, to retain: `kl_to_reference` with a second model's logits;
  `kl_to_cached_reference` without one.
"""

from eupmu_jax.objectives.confidence import confidence, confidence_target, unseen_confidence
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
from eupmu_jax.objectives.reference import (
    TopLogProbabilities,
    kl_to_cached_reference,
    reference_values,
    top_log_probabilities,
)
from eupmu_jax.objectives.representations import representation_misdirection
from eupmu_jax.objectives.tokens import by_token

__all__ = [
    "TopLogProbabilities",
    "by_token",
    "confidence",
    "confidence_target",
    "cross_entropy",
    "denoising_rise",
    "gradient_ascent",
    "kl_to_cached_reference",
    "kl_to_reference",
    "kl_to_uniform",
    "masked_mean",
    "noise_prediction_redirect",
    "npo",
    "reference_values",
    "representation_misdirection",
    "sequence_log_probability",
    "simnpo",
    "top_log_probabilities",
    "unlikelihood",
    "unseen_confidence",
    "velocity_prediction_redirect",
    "wrong_labels",
]
