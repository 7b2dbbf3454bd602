r"""Objectives on the predictions of diffusion models: of noise, of velocity, or of the clean example.

In all of them :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` with :math:`\alpha_t^2 + \sigma_t^2 = 1`, and
the velocity is :math:`v = \alpha_t \epsilon - \sigma_t x_0`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eupmu_jax.objectives.masks import check_shape, what_counts, wide, wide_pair

ANY_RANK = range(1, 99)


def noise_prediction_redirect(
    predicted_noise: ArrayLike, target_noise: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    r"""The error to another class's noise prediction: what is forgotten is denoised as something else.

    .. math:: \tfrac1n \| \epsilon_\theta(x_t, c) - \mathrm{stop}(\epsilon(x_t, c')) \|^2

    for the class or prompt c to forget and another one c', at the same noisy x_t and time t; n is the
    number of entries of one example. Range [0, inf). For a model of velocities see
    `velocity_prediction_redirect`.

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
    predicted, target = wide_pair(
        "predicted_noise", predicted_noise, "target_noise", target_noise, "[B, ...]", ANY_RANK
    )
    return _mean_square(predicted - target, what_counts(mask, predicted.shape[:1]))


def velocity_prediction_redirect(
    predicted_velocity: ArrayLike,
    target_velocity: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    signal_rate: ArrayLike | None = None,
) -> jax.Array:
    r"""The error to another class's velocity prediction: the redirect for a model of velocities.

    .. math:: \tfrac1n \| v_\theta(x_t, c) - \mathrm{stop}(v(x_t, c')) \|^2,
        \qquad \text{with } \alpha_t \text{ times } \alpha_t^2

    Range [0, inf). A velocity v at x_t says that the noise is :math:`\alpha_t v + \sigma_t x_t`: the squared
    error of noises is :math:`\alpha_t^2` times that of velocities. Without a signal_rate the noise levels
    weigh as in the training of a model of velocities. With it they weigh as in that of a model of noises:
    next to nothing where there is nearly no signal, which is where a class is decided.

    Args:
      predicted_velocity: the prediction for c, floating [B, ...].
      target_velocity: the prediction for c', of the same shape, by any model. No gradient flows into it.
      mask: bool [B], True for an example that counts; None for all.
      signal_rate: alpha_t, floating [B], to have the value of `noise_prediction_redirect`; None for the
        error of the velocities.

    Returns:
      [B], float32 or wider, the mean over all axes but the first, in squared units of x_t; NaN for an
      example that does not count.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> from eupmu_jax import objectives
      >>> predicted, target = jnp.array([[0.0, 2.0]]), jnp.array([[0.0, 0.0]])
      >>> objectives.velocity_prediction_redirect(predicted, target).tolist()
      [2.0]
      >>> objectives.velocity_prediction_redirect(predicted, target, signal_rate=jnp.array([0.5])).tolist()
      [0.5]

    Source: velocities are of Salimans and Ho, arXiv 2202.00512; redirecting is SalUn's, arXiv 2310.12508.
    """
    predicted, target = wide_pair(
        "predicted_velocity", predicted_velocity, "target_velocity", target_velocity, "[B, ...]", ANY_RANK
    )
    counts = what_counts(mask, predicted.shape[:1])
    error = _mean_square(predicted - target, counts)
    if signal_rate is None:
        return error
    check_shape("signal_rate", signal_rate, predicted.shape[:1], "one for each example")
    rate = wide("signal_rate", signal_rate, "[B]", [1])
    return jnp.where(counts, rate**2 * error, jnp.nan)


def denoising_rise(
    predicted: ArrayLike, reference: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    r"""How much the denoising loss rose over the original model's at the same noise: a retain loss.

    .. math:: \tfrac1n \left( \| p - y \|^2 - \| p_0 - y \|^2 \right)
        = \tfrac1n \langle p - p_0,\; p + p_0 - 2 y \rangle

    for predictions p of the model, p_0 of the original one, and their target y, the true noise or velocity.
    Its gradient is that of the denoising loss. Its expectation is the rise of that loss, and 0 before the
    first step: a `Budget` is measured from 0, and a relative one is a share of the original model's loss.
    The loss of a batch depends on the noise that was drawn much more than on a few steps. The original's
    loss has nearly the same noise in it, so that the difference, a control variate, has little. A budget
    and a lagged tolerance are steered by it. A look-ahead compares two models on the same noise by itself.

    Range (-inf, inf): it is negative where the model got better, so it needs raw losses (log_losses=False).

    Args:
      predicted: p, floating [B, ...].
      reference: p_0, of the same shape, of the frozen original model. No gradient flows into it.
      target: y, of the same shape. No gradient flows into it.
      mask: bool [B], True for an example that counts; None for all.

    Returns:
      [B], float32 or wider, the mean over all axes but the first, in squared units of the prediction; NaN
      for an example that does not count. Computed by the product on the right, which cancels nothing.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      The original goes into params as frozen leaves, so that `unlearn` neither trains nor copies it.

      >>> import numpy as np, optax
      >>> import eupmu_jax as eu
      >>> from eupmu_jax import objectives
      >>> apply = lambda w, x, c: w[c][:, None] * x  # predicts the noise in x = 0.6 clean + 0.8 noise
      >>> def losses_fn(params, batch):
      ...     noise = jax.random.normal(batch["key"], batch["retain"].shape)
      ...     x, forget, other = 0.6 * batch["retain"] + 0.8 * noise, jnp.zeros(8, int), jnp.ones(8, int)
      ...     predicted, reference = apply(params["model"], x, other), apply(params["original"], x, other)
      ...     redirected = apply(params["model"], batch["forget"], forget)
      ...     to = apply(params["original"], batch["forget"], other)
      ...     return eu.Losses(
      ...         objectives.noise_prediction_redirect(redirected, to).mean(),
      ...         objectives.denoising_rise(predicted, reference, noise).mean(),
      ...     )
      >>> images = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
      >>> w = jnp.array([0.0, 0.8])
      >>> params, history = eu.unlearn(
      ...     losses_fn, {"model": w, "original": w}, images, images, optax.adam(0.05), eu.Budget(0.01),
      ...     steps=60, batch_size=8, trainable=lambda path: path == "model")
      >>> bool(abs(params["model"][0] - 0.8) < 0.05), history.promise.holds
      (True, True)

    Source: control variates are standard; that a budget needs one here is ours.
    """
    predicted, target = wide_pair("predicted", predicted, "target", target, "[B, ...]", ANY_RANK)
    predicted, reference = wide_pair("predicted", predicted, "reference", reference, "[B, ...]", ANY_RANK)
    counts = what_counts(mask, predicted.shape[:1])
    change = _counted(predicted - reference, counts)
    return _mean(change * _counted(predicted + reference - 2 * target, counts), counts)


def _mean_square(difference: jax.Array, counts: jax.Array) -> jax.Array:
    return _mean(_counted(difference, counts) ** 2, counts)


def _counted(values: jax.Array, counts: jax.Array) -> jax.Array:
    """0 in place of what does not count, which may be NaN, whose derivative is NaN even times 0."""
    return jnp.where(jnp.expand_dims(counts, tuple(range(1, values.ndim))), values, 0)


def _mean(values: jax.Array, counts: jax.Array) -> jax.Array:
    """Over all axes but the first, [B]; NaN for an example that does not count."""
    return jnp.where(counts, jnp.mean(values, tuple(range(1, values.ndim))), jnp.nan)
