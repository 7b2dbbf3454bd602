"""Arrays and masks as every objective takes them, and the mean over what counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from eupmu_jax.method.losses import Mean, accumulation_dtype

LOGITS, VALUES = "[B, C] or [B, T, V]", "[B], one for each example"


def masked_mean(values: Any, mask: Any = None) -> Mean:
    r"""The mean of values over the examples that count, as the sum and the count that `Losses` takes.

    .. math:: \textstyle\sum_b m_b v_b \;/\; \sum_b m_b

    A value that does not count may be NaN or infinite: it enters neither the mean nor the gradient with
    respect to values. Where the network itself is NaN there, give the objective the mask as well.

    Args:
      values: per example, floating [B], as the functions of this module return.
      mask: bool [B], True for an example that counts; None for all. For tokens [B, T]: mask.any(-1).

    Returns:
      `Mean` of total [] and count [], float32 or wider; of no examples the count is 0.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> from eupmu_jax import objectives
      >>> mean = objectives.masked_mean(jnp.array([1.0, jnp.nan, 4.0]), jnp.array([True, False, True]))
      >>> float(mean.total), float(mean.count)
      (5.0, 2.0)

    Source: ours.
    """
    values = wide("values", values, VALUES, [1])
    counts = what_counts(mask, values.shape)
    return Mean(jnp.sum(jnp.where(counts, values, 0)), jnp.sum(counts, dtype=values.dtype))


def wide(name, array, wanted, ranks):
    """In float32 or wider, checked for its dtype and number of axes."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype}")
    if array.ndim not in ranks or array.shape[1:][-1:] == (0,):
        raise ValueError(f"{name} must have the shape {wanted}, got {array.shape}")
    return array.astype(accumulation_dtype(array))


def wide_pair(names, arrays, wanted, ranks):
    """Two of one shape, in one dtype; no gradient flows into the second."""
    check_shape(names[1], arrays[1], jnp.shape(arrays[0]), f"that of {names[0]}")
    first, second = (wide(name, array, wanted, ranks) for name, array in zip(names, arrays, strict=True))
    dtype = accumulation_dtype(first, second)
    return first.astype(dtype), jax.lax.stop_gradient(second.astype(dtype))


def check_shape(name, array, shape, why):
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} must have the shape {shape}, {why}; got {jnp.shape(array)}")


def what_counts(mask, shape):
    """The mask, True everywhere if there is none."""
    if mask is None:
        return jnp.ones(shape, bool)
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool):
        raise TypeError(f"mask must be boolean, got {jnp.result_type(mask)}: pass mask > 0")
    check_shape("mask", mask, shape, "an entry for each value or label")
    return jnp.asarray(mask)


def log_softmax(logits, counts):
    # The derivative of a NaN is NaN even times 0: it is replaced before, not after, the logarithm.
    return jax.nn.log_softmax(jnp.where(counts[..., None], logits, 0))


def label_log_probability(logits, labels, mask, name="labels", wanted=LOGITS, ranks=(2, 3)):
    """Log-probabilities, that of the label (NaN out of range), labels without those, what counts."""
    logits = wide("logits", logits, wanted, ranks)
    counts = what_counts(mask, logits.shape[:-1])
    labels, in_range = checked_labels(name, labels, counts, logits.shape[-1])
    log_p = log_softmax(logits, counts)
    # Gathering by itself would take -1 for the last class.
    log_p_label = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return log_p, jnp.where(in_range, log_p_label, jnp.nan), labels, counts


def checked_labels(name, labels, counts, num_classes):
    """As int32 with 0 in place of what is out of range, and whether each is in range."""
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


def mean_of_tokens(values, counts):
    """[B] from [B], or from [B, T] the mean over what counts; NaN where nothing does."""
    axes = tuple(range(1, values.ndim))
    number = jnp.sum(counts, axes, dtype=values.dtype)
    total = jnp.sum(jnp.where(counts, values, 0), axes)
    return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)
