"""Objectives on hidden states: representation misdirection."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eupmu_jax.objectives.masks import mean_of_tokens, what_counts, wide_pair


def representation_misdirection(
    hidden: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    r"""The squared distance of hidden states from a target: both losses of RMU.

    .. math:: \| h_\theta - c \, u \|^2 \text{ to forget}, \qquad
        \| h_\theta - h_\text{ref} \|^2 \text{ to retain}; \qquad
        \text{over the tokens that count: their mean}

    The states of one layer are driven to a fixed direction u of length 1, times c, so that the layers above
    can make nothing of them. On retain data the states of the model before unlearning are held. Range
    [0, inf). It is a sum over the D entries of a state, as in the paper; the paper's code takes their mean.

    Args:
      hidden: the model's states after one layer, floating [B, T, D], or [B, D].
      target: c u, floating [D], drawn once before the run; or h_ref, of the shape of hidden. No gradient
        flows into it.
      mask: bool [B, T], or [B], True where an entry counts; None for all. Elsewhere states may be anything.

    Returns:
      [B], float32 or wider, in squared units of the states; NaN for an example of which nothing counts.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> import jax
      >>> from eupmu_jax import objectives
      >>> u = jax.random.uniform(jax.random.key(0), 4)
      >>> target = 6.5 * u / jnp.linalg.norm(u)
      >>> objectives.representation_misdirection(jnp.zeros((1, 3, 4)), target).round(2)
      Array([42.25], dtype=float32)

    Source: Li et al., arXiv 2403.03218, which draws u uniformly from [0, 1)^D before it is normalised.
    """
    if jnp.shape(target) == jnp.shape(hidden)[-1:]:
        target = jnp.broadcast_to(target, jnp.shape(hidden))
    hidden, target = wide_pair("hidden", hidden, "target", target, "[B, D] or [B, T, D]", [2, 3])
    counts = what_counts(mask, hidden.shape[:-1])
    difference = jnp.where(counts[..., None], hidden - target, 0)
    return mean_of_tokens(jnp.sum(difference**2, -1), counts)
