"""What is kept of the model before unlearning, in place of a second model in every step."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eupmu_jax.method.types import PyTree
from eupmu_jax.objectives.masks import (
    LOGITS,
    check_shape,
    checked_labels,
    divergence,
    log_softmax,
    mean_of_tokens,
    what_counts,
    wide,
)


class TopLogProbabilities(NamedTuple):
    """The most probable outcomes of a prediction, and all others as one: what `kl_to_cached_reference` takes.

    Attributes:
      ids: int32 [..., k], which classes or tokens.
      log_p: float32 or wider [..., k], their log-probabilities in nats.
      log_others: likewise [...], the log-probability of all others together; -inf where there are none.

    Example:
      >>> import jax.numpy as jnp
      >>> from eupmu_jax import objectives
      >>> kept = objectives.top_log_probabilities(jnp.log(jnp.array([0.1, 0.2, 0.7])), k=1)
      >>> float(jnp.exp(kept.log_p[0]) + jnp.exp(kept.log_others))
      1.0
    """

    ids: Any
    log_p: Any
    log_others: Any


def top_log_probabilities(logits: ArrayLike, k: int) -> TopLogProbabilities:
    r"""The k most probable outcomes and the probability of all others, to be cached.

    .. math:: \log p_{c_1} \ge \dots \ge \log p_{c_k}, \qquad
        \log p_\text{others} = \log \textstyle\sum_{c \notin \{c_1, \dots, c_k\}} p_c

    Args:
      logits: floating [..., C], such as [B, C], or [n, V] within `by_token`.
      k: how many to keep, an int from 1 to C.

    Returns:
      `TopLogProbabilities`; no gradient flows into them.

    Raises:
      TypeError: logits that are not floating, a k that is no int.
      ValueError: a k that is out of range.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.top_log_probabilities(jnp.array([[0.0, 3.0, 1.0, 2.0]]), k=2).ids
      Array([[1, 3]], dtype=int32)
    """
    logits, k = wide("logits", logits, "[..., C]", range(1, 99)), operator.index(k)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie in [1, {logits.shape[-1]}], the number of classes, got {k}")
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits))
    ids = jax.lax.top_k(log_p, k)[1]
    return TopLogProbabilities(ids, *_kept_and_others(log_p, ids))


def kl_to_cached_reference(
    logits: ArrayLike, reference: TopLogProbabilities, mask: ArrayLike | None = None
) -> jax.Array:
    r"""The divergence from a reference model's prediction, of which k outcomes and the rest are known.

    .. math:: \textstyle\sum_{c \in \text{kept}} q_c (\log q_c - \log p_c)
        + q_\text{others} (\log q_\text{others} - \log p_\text{others})

    It needs 2k + 1 numbers a token where `kl_to_reference` needs V, or a second model. It is never above
    `kl_to_reference`, by the data-processing inequality: what changes among the others alone, it does not
    see. With k = C the two are equal. Range [0, inf), 0 only where all kept probabilities are equal, up to
    rounding. The gradient pulls the others up or down together, by their share of each.

    Args:
      logits: those of the model, floating [B, C], or [B, T, V].
      reference: `top_log_probabilities` of the reference's logits: ids and log_p [B, k], or [B, T, k], and
        log_others [B], or [B, T]. No gradient flows into it.
      mask: bool [B], or [B, T], True where an entry counts; None for all.

    Returns:
      [B] in nats, float32 or wider, the mean over the tokens that count. Under jit an id outside [0, C) gives
      NaN, so that the step is skipped.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these; ids outside [0, C), where they are known.

    Example:
      >>> from eupmu_jax import objectives
      >>> original = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
      >>> reference = objectives.top_log_probabilities(original, k=1)
      >>> logits = jnp.log(jnp.array([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1]]))
      >>> objectives.kl_to_cached_reference(logits, reference).round(3)
      Array([0.223, 0.   ], dtype=float32)
    """
    logits = wide("logits", logits, LOGITS, [2, 3])
    counts = what_counts(mask, logits.shape[:-1])
    each = (*counts.shape, *jnp.shape(reference.ids)[-1:])
    check_shape("reference.ids", reference.ids, each, "k for each prediction")
    check_shape("reference.log_p", reference.log_p, each, "that of reference.ids")
    check_shape("reference.log_others", reference.log_others, counts.shape, "one for each prediction")
    counted = jnp.broadcast_to(counts[..., None], each)
    ids, in_range = checked_labels("reference.ids", reference.ids, counted, logits.shape[-1])
    kept, others = _kept_and_others(log_softmax(logits, counts), ids)
    log_q = [
        jnp.where(in_range, wide("reference.log_p", reference.log_p, "[..., k]", [2, 3]), jnp.nan),
        wide("reference.log_others", reference.log_others, "[...]", [1, 2])[..., None],
    ]
    log_q = jax.lax.stop_gradient(jnp.concatenate([part.astype(kept.dtype) for part in log_q], -1))
    return mean_of_tokens(divergence(log_q, jnp.concatenate([kept, others[..., None]], -1)), counts)


def _kept_and_others(log_p: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of log-probabilities [..., C] those at ids [..., k], and that of all others together [...]."""
    is_kept = jnp.put_along_axis(jnp.zeros(log_p.shape, bool), ids, True, -1, inplace=False)
    # Summed, not 1 minus the kept, which would round to 0 where those have nearly all.
    others = jnp.where(is_kept, -jnp.inf, log_p)
    # The derivative of the logarithm of an empty sum is NaN, even times 0.
    is_empty = jnp.all(others == -jnp.inf, -1)
    log_others = jax.nn.logsumexp(jnp.where(is_empty[..., None], 0, others), -1)
    return jnp.take_along_axis(log_p, ids, -1), jnp.where(is_empty, -jnp.inf, log_others)


def reference_values(
    function: Callable[[Any, Any], Any], params: PyTree, rows: PyTree, batch_size: int = 256
) -> Any:
    r"""A function's values of all rows under the model before unlearning, to be stored beside the rows.

    .. math:: v_i = f(\theta_0, x_i), \quad i = 1, \dots, N

    Such are the log-probabilities for `npo`, the `confidence` for `unseen_confidence`, and
    `top_log_probabilities` for `kl_to_cached_reference`: they are computed once, and no step holds a second
    model. All batches are of one shape, so that one program is compiled.

    Args:
      function: (params, batch) -> an array [batch_size, ...], or a pytree of such. It is compiled, and must
        take every row for itself: the last batch is filled up with copies of the last row.
      params: the model's, a pytree of arrays; passed, not closed over.
      rows: a pytree of arrays with one leading axis of N >= 1 rows, the same for all.
      batch_size: rows at a time, an int >= 1; at most N are taken.

    Returns:
      NumPy arrays [N, ...], in the structure that the function returns, in the order of the rows.

    Raises:
      TypeError: a batch_size that is no int.
      ValueError: rows that are empty or of unequal length; a batch_size < 1; values without the leading axis.

    Example:
      >>> from eupmu_jax import objectives
      >>> rows = {"x": jnp.arange(5.0), "y": jnp.ones(5)}
      >>> value = lambda params, rows: params * rows["x"] + rows["y"]
      >>> objectives.reference_values(value, jnp.array(2.0), rows, batch_size=2)
      array([1., 3., 5., 7., 9.], dtype=float32)
    """
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(rows)}
    if len(lengths) != 1 or () in lengths:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(rows)]
        raise ValueError(
            f"rows must be arrays with one leading axis of rows, the same for all; got the shapes {shapes}"
        )
    (length,) = lengths.pop()
    if length == 0:
        raise ValueError("rows is empty: there is nothing to compute values of")
    batch_size = min(operator.index(batch_size), length)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    rows, compiled, parts = jax.tree.map(np.asarray, rows), jax.jit(function), []
    for start in range(0, length, batch_size):
        at = np.minimum(np.arange(start, start + batch_size), length - 1)
        part = jax.device_get(compiled(params, jax.tree.map(lambda x, at=at: x[at], rows)))
        if any(np.shape(leaf)[:1] != (batch_size,) for leaf in jax.tree.leaves(part)):
            shapes = [np.shape(leaf) for leaf in jax.tree.leaves(part)]
            raise ValueError(
                f"function must return a value for each row, [batch_size, ...]; for a batch_size of "
                f"{batch_size} it returned the shapes {shapes}"
            )
        parts.append(part)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:length], *parts)
