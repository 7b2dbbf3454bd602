"""Objectives on the log probability of a sequence: NPO and SimNPO."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from eupmu_jax.objectives.masks import VALUES, check_shape, labelled, log_probability, wide, wide_pair


def sequence_log_probability(
    logits: ArrayLike, targets: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    r"""The log-probability of each sequence: what `npo` and `simnpo` take.

    .. math:: \log \pi(y) = \textstyle\sum_t m_t \log p_t(y_t)

    Range [-inf, 0]; 0 where no token counts.

    Args:
      logits: floating [B, T, V]; logits[:, t] predict targets[:, t].
      targets: integers [B, T].
      mask: bool [B, T], True where a token counts (the answer, not the prompt); None for all.

    Returns:
      [B] in nats, float32 or wider. Under jit a target outside [0, V) gives NaN. For classes, with labels
      [B], the log-probability is ``-cross_entropy(logits, labels)``.

    Raises:
      TypeError: as for `cross_entropy`.
      ValueError: other shapes; targets outside [0, V), where they are known.

    Example:
      >>> from eupmu_jax import objectives
      >>> targets, mask = jnp.array([[1, 0, -100]]), jnp.array([[True, True, False]])
      >>> objectives.sequence_log_probability(jnp.zeros((1, 3, 2)), targets, mask).round(4)
      Array([-1.3863], dtype=float32)
    """
    at = labelled(logits, targets, mask, "targets", "[B, T, V]", [3])
    return jnp.sum(jnp.where(at.counts, log_probability(at), 0), -1)


def npo(
    log_probability: ArrayLike, reference_log_probability: ArrayLike, beta: float | jax.Array = 0.1
) -> jax.Array:
    r"""Negative preference optimisation: gradient ascent that eases off as the reference is left behind.

    .. math:: -\tfrac2\beta \log\sigma\big(-\beta (\log\pi - \log\pi_\text{ref})\big)

    Range [0, inf), 2 log(2) / beta at the reference. Its gradient is that of log pi times
    2 pi^beta / (pi^beta + pi_ref^beta). As beta -> 0 that factor -> 1, and npo becomes gradient ascent.

    Args:
      log_probability: log pi of each forget example, floating [B], from `sequence_log_probability`.
      reference_log_probability: the same under the model before unlearning. No gradient flows into it.
      beta: the inverse temperature > 0. The paper uses 0.1.

    Returns:
      [B], float32 or wider. An example of which no token counts has the value at the reference, and no
      gradient: leave it out with `masked_mean`.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these; a beta that is not positive.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.npo(jnp.array([-5.0, -200.0]), jnp.array([-5.0, -5.0])).round(4)
      Array([13.8629,  0.    ], dtype=float32)

    Source: Zhang et al., arXiv 2404.05868.
    """
    value, reference = wide_pair(
        "log_probability",
        log_probability,
        "reference_log_probability",
        reference_log_probability,
        VALUES,
        [1],
    )
    return _preference(value - reference, beta=beta)


def simnpo(
    log_probability: ArrayLike,
    length: ArrayLike,
    beta: float | jax.Array,
    gamma: float | jax.Array = 0.0,
) -> jax.Array:
    r"""NPO without a reference model: the log-probability per token stands in for the ratio.

    .. math:: -\tfrac2\beta \log\sigma\big(-\tfrac{\beta}{|y|} \log\pi - \gamma\big)

    Range [0, inf). With a larger gamma it eases off at a lower probability.

    Args:
      log_probability: log pi of each forget example, floating [B], from `sequence_log_probability`.
      length: ``|y|``, the number of tokens that count in each example, real [B]: mask.sum(-1).
      beta: the inverse temperature > 0. The paper's code searches it for each task, between 1 and 4.5.
      gamma: the reward margin, added to beta times nats per token. It is that code's gamma times beta.

    Returns:
      [B], float32 or wider; NaN for a length that is not positive: leave it out with `masked_mean`.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these; a beta that is not positive.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.simnpo(jnp.array([0.0, -50.0]), jnp.array([5, 5]), beta=2.0).round(4)
      Array([0.6931, 0.    ], dtype=float32)

    Source: Fan et al., arXiv 2410.07163.
    """
    value = wide("log_probability", log_probability, VALUES, [1])
    check_shape("length", length, value.shape, "that of log_probability")
    length = jnp.asarray(length).astype(value.dtype)
    per_token = value / jnp.where(length > 0, length, 1)
    return jnp.where(length > 0, _preference(per_token, beta=beta, gamma=gamma), jnp.nan)


def _preference(
    log_ratio: jax.Array, *, beta: float | jax.Array, gamma: float | jax.Array = 0.0
) -> jax.Array:
    """-2 / beta log sigmoid(-beta log_ratio - gamma)."""
    for name, value in {"beta": beta, "gamma": gamma}.items():
        if np.ndim(value):
            check_shape(name, value, log_ratio.shape, "a number, or one for each example")
    if not isinstance(beta, Tracer) and not np.all(np.asarray(beta) > 0):
        raise ValueError(f"beta must be > 0, got {beta}")
    return 2 / beta * jax.nn.softplus(beta * log_ratio + gamma)
