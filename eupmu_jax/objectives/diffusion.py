"""Objectives on noise predictions."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eupmu_jax.objectives.masks import what_counts, wide_pair


def noise_prediction_redirect(
    predicted_noise: ArrayLike, target_noise: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    r"""The error to another class's noise prediction: what is forgotten is denoised as something else.

    .. math:: \tfrac1n \| \epsilon_\theta(x_t, c) - \mathrm{stop}(\epsilon(x_t, c')) \|^2

    for the class or prompt c to forget and another one c', at the same noisy x_t and time t; n is the
    number of entries of one example. Range [0, inf).

    Args:
      predicted_noise: the prediction for c, floating [B, ...].
      target_noise: the prediction for c', of the same shape, by any model. No gradient flows into it.
      mask: bool [B], True for an example that counts; None for all.

    Returns:
      [B], float32 or wider, the mean over all axes but the first, in squared units of the noise; NaN for an
      example that does not count.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> from eupmu_jax import objectives
      >>> predicted, target = jnp.ones((1, 2, 2)), jnp.array([[[1.0, 1.0], [1.0, 3.0]]])
      >>> objectives.noise_prediction_redirect(predicted, target).tolist()
      [1.0]

    Source: SalUn (arXiv 2310.12508) and the EUPMU repository (arXiv 2510.22124).
    """
    any_rank = range(1, 99)
    predicted, target = wide_pair(
        "predicted_noise", predicted_noise, "target_noise", target_noise, "[B, ...]", any_rank
    )
    counts = what_counts(mask, predicted.shape[:1])
    axes = tuple(range(1, predicted.ndim))
    difference = jnp.where(jnp.expand_dims(counts, axes), predicted - target, 0)
    return jnp.where(counts, jnp.mean(difference**2, axes), jnp.nan)
