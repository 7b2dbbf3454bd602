"""Arrays and masks as every objective takes them, and the mean over what counts."""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from eupmu_jax.method.losses import Mean, accumulation_dtype

LOGITS, VALUES = "[B, C] or [B, T, V]", "[B], one for each example"
OF_TOKENS = "[B], one for each example, or [B, T], one for each token"


def masked_mean(values: ArrayLike, mask: ArrayLike | None = None) -> Mean:
    r"""The mean of values over the examples or tokens that count, as the sum and count that `Losses` takes.

    .. math:: \textstyle\sum_i m_i v_i \;/\; \sum_i m_i

    A value that does not count may be NaN or infinite: it enters neither the mean nor the gradient with
    respect to values. If the network itself is NaN there, give the mask to the objective as well.

    Args:
      values: one for each example, floating [B], as the objectives return them, or one for each token,
        [B, T], as `by_token` does. Of values [B, T] it is the mean over tokens: a long example weighs more.
      mask: bool of the shape of values, True where a value counts; None for all. For values [B] of examples
        whose mask is [B, T]: mask.any(-1).

    Returns:
      A `Mean` whose total [] and count [] are float32 or wider. The count of no examples is 0.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> from eupmu_jax import objectives
      >>> mean = objectives.masked_mean(jnp.array([1.0, jnp.nan, 4.0]), jnp.array([True, False, True]))
      >>> float(mean.total), float(mean.count)
      (5.0, 2.0)
    """
    values = wide("values", values, OF_TOKENS, [1, 2])
    counts = what_counts(mask, values.shape)
    return Mean(jnp.sum(jnp.where(counts, values, 0)), jnp.sum(counts, dtype=values.dtype))


def wide(name: str, array: ArrayLike, wanted: str, ranks: Collection[int]) -> jax.Array:
    """`array` in float32 or wider, checked for its dtype and number of axes."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype}")
    has_no_classes = array.ndim > 1 and array.shape[-1] == 0
    if array.ndim not in ranks or has_no_classes:
        raise ValueError(f"{name} must have the shape {wanted}, got {array.shape}")
    return array.astype(accumulation_dtype(array))


def wide_pair(
    name: str,
    array: ArrayLike,
    reference_name: str,
    reference: ArrayLike,
    wanted: str,
    ranks: Collection[int],
) -> tuple[jax.Array, jax.Array]:
    """Two arrays of one shape, in one dtype; no gradient flows into the reference."""
    check_shape(reference_name, reference, jnp.shape(array), f"that of {name}")
    array, reference = wide(name, array, wanted, ranks), wide(reference_name, reference, wanted, ranks)
    dtype = accumulation_dtype(array, reference)
    return array.astype(dtype), jax.lax.stop_gradient(reference.astype(dtype))


def check_shape(name: str, array: ArrayLike, shape: tuple[int, ...], why: str) -> None:
    """ValueError unless the array has the shape, which it must for the reason `why`."""
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} must have the shape {shape}, {why}; got {jnp.shape(array)}")


def what_counts(mask: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array:
    """The mask, bool of that shape; True everywhere if there is none."""
    if mask is None:
        return jnp.ones(shape, bool)
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool):
        raise TypeError(f"mask must be boolean, got {jnp.result_type(mask)}: pass mask > 0")
    check_shape("mask", mask, shape, "an entry for each value or label")
    return jnp.asarray(mask)


def log_softmax(logits: jax.Array, counts: jax.Array) -> jax.Array:
    """Of [..., C], where what does not count is replaced by equal logits."""
    # The derivative of a NaN is NaN even times 0: it is replaced before, not after, the logarithm.
    return jax.nn.log_softmax(jnp.where(counts[..., None], logits, 0))


class Labelled(NamedTuple):
    """Predictions with classes along a last axis C, and what is said of each.

    Attributes:
      logits: float32 or wider [..., C], 0 where they do not count.
      labels: int32 [...], 0 where the label is out of range.
      in_range: bool [...].
      counts: bool [...].
    """

    logits: jax.Array
    labels: jax.Array
    in_range: jax.Array
    counts: jax.Array


def labelled(
    logits: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike | None,
    name: str = "labels",
    wanted: str = LOGITS,
    ranks: Collection[int] = (2, 3),
) -> Labelled:
    """Logits and labels, checked; `name` is what messages call the labels."""
    logits = wide("logits", logits, wanted, ranks)
    counts = what_counts(mask, logits.shape[:-1])
    labels, in_range = checked_labels(name, labels, counts, logits.shape[-1])
    # The derivative of a NaN is NaN even times 0: it is replaced before, not after, the logarithm.
    return Labelled(jnp.where(counts[..., None], logits, 0), labels, in_range, counts)


def is_label(at: Labelled) -> jax.Array:
    """Which class is the label, bool [..., C]."""
    classes = jax.lax.broadcasted_iota(at.labels.dtype, at.logits.shape, at.logits.ndim - 1)
    return classes == at.labels[..., None]


def log_probability(at: Labelled) -> jax.Array:
    """log p_y of the label, [...]; NaN where it is out of range."""
    return _of_label(at, jax.nn.log_softmax(at.logits))


def log_odds(at: Labelled) -> jax.Array:
    """log p_y - log(1 - p_y) of the label, [...]; NaN where it is out of range."""
    # An infinite logit is a diverged network's, which must not pass for certainty.
    logits = jnp.where(at.logits == jnp.inf, jnp.nan, at.logits)
    # Of logits, not of probabilities, of which all but one may round to 0.
    return _of_label(at, logits) - jax.nn.logsumexp(jnp.where(is_label(at), -jnp.inf, logits), -1)


def _of_label(at: Labelled, values: jax.Array) -> jax.Array:
    # Gathering by itself would take -1 for the last class.
    return jnp.where(at.in_range, jnp.take_along_axis(values, at.labels[..., None], -1)[..., 0], jnp.nan)


def divergence(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """KL(q || p) over the last axis; an outcome that q rules out adds nothing."""
    q = jnp.exp(log_q)
    adds = q != 0  # true of NaN, which has to come through
    return jnp.sum(q * (jnp.where(adds, log_q, 0) - jnp.where(adds, log_p, 0)), -1)


def checked_labels(
    name: str, labels: ArrayLike, counts: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """The labels as int32, 0 in place of those out of range, and whether each is in range."""
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{name} must be integers, got {jnp.result_type(labels)}")
    check_shape(name, labels, counts.shape, "one for each prediction")
    is_known = lambda array: not isinstance(array, Tracer) and getattr(array, "is_fully_addressable", True)
    if is_known(labels) and is_known(counts):
        counted = np.asarray(labels)[np.asarray(counts)]
        if counted.size and (counted.min() < 0 or counted.max() >= num_classes):
            found = f"got {counted.min()} to {counted.max()}"
            raise ValueError(f"{name} must lie in [0, {num_classes}) where they count, {found}")
    labels = jnp.asarray(labels)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # uint8 cannot hold 256
    in_range = (labels >= 0) & (labels < num_classes)
    return jnp.where(in_range, labels, 0).astype(jnp.int32), in_range


def mean_of_tokens(values: jax.Array, counts: jax.Array) -> jax.Array:
    """The mean over the tokens that count, [B] from [B] or [B, T]; NaN where none does."""
    axes = tuple(range(1, values.ndim))
    number = jnp.sum(counts, axes, dtype=values.dtype)
    total = jnp.sum(jnp.where(counts, values, 0), axes)
    return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)
