"""What a step sees: the forget and retain losses, and the weights that combine them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    r"""A mean given as its sum and its count, for a part of `Losses`: exact when devices hold unequally many.

    .. math:: \textstyle\sum_d \text{total}_d \;/\; \sum_d \text{count}_d

    over the devices d of an axis_name, in place of the mean of their means. Anywhere else it is
    total / count.

    Attributes:
      total: the sum over this device's examples, floating, shape [], or [K] for a retain loss.
      count: how many those are (or the sum of their weights), real, [] or the shape of total; 0 on a
        device that has none. It is not differentiated.

    Where no device has any, the mean is NaN and the step is skipped.

    Example:
      >>> import jax.numpy as jnp
      >>> import eupmu_jax as eu
      >>> def losses_fn(params, batch):
      ...     error = batch["mask"] * (params - batch["x"]) ** 2
      ...     return eu.Losses(forget=error[0], retain=eu.Mean(jnp.sum(error), jnp.sum(batch["mask"])))
      >>> batch = {"x": jnp.array([2.0, 1.0, 3.0]), "mask": jnp.array([1.0, 0.0, 1.0])}
      >>> losses, _, _ = eu.forget_and_retain_grads(losses_fn)(jnp.array(1.0), batch)
      >>> losses.retain
      Array(2.5, dtype=float32)
    """

    total: Any
    count: Any


class Losses(NamedTuple):
    r"""The forget loss U and the retain loss R of one batch: what ``losses_fn`` returns.

    Attributes:
      forget: U(theta), a scalar float, minimised in order to forget.
      retain: R(theta), the utility to preserve: a scalar float, or shape [K] for K utilities.

    Both are means over the batch, in the loss's own units (nats for a cross-entropy), or `Mean`, a sum
    and a count each. Return them in float32 or wider: a difference of bfloat16 losses has too few
    digits to steer by.

    Example:
      >>> import jax.numpy as jnp
      >>> import eupmu_jax as eu
      >>> def losses_fn(params, batch):
      ...     error = (params - batch) ** 2
      ...     return eu.Losses(forget=error[0], retain=jnp.mean(error[1:]))
      >>> losses_fn(jnp.array(1.0), jnp.array([2.0, 1.0, 3.0]))
      Losses(forget=Array(1., dtype=float32), retain=Array(2., dtype=float32))

    Source: U and R of arXiv 2510.22124; K utilities are ours.
    """

    forget: Any
    retain: Any


LossesFn = Callable[[Any, Any], Losses]
"""(params, batch) -> Losses; a batch is whatever the function takes."""


def check_losses_fn(losses_fn: Any) -> None:
    if not callable(losses_fn):
        raise TypeError(f"losses_fn must be a function (params, batch) -> Losses, got {losses_fn!r}")


def accumulation_dtype(*arrays):
    """float64 where any input is, else float32: losses, dots and multipliers are never narrower."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def as_means(losses: Any, source: str = "losses_fn must return") -> Losses:
    """`losses` as accumulation-dtype means; TypeError or ValueError if it is not a Losses."""
    totals, counts = totals_and_counts(losses, source)
    return jax.tree.map(jnp.divide, totals, counts)


def totals_and_counts(losses: Any, source: str = "losses_fn must return") -> tuple[Losses, Losses]:
    """Both in the accumulation dtype; what is no Mean is the total of one."""
    if not isinstance(losses, Losses):
        raise TypeError(f"{source} eupmu_jax.Losses(forget, retain), got {type(losses).__name__}")
    totals, counts = {}, {}
    for name, loss, highest_rank in (("forget", losses.forget, 0), ("retain", losses.retain, 1)):
        total, count = loss if isinstance(loss, Mean) else (loss, 1)
        known = hasattr(total, "dtype") or isinstance(total, int | float)
        dtype = jnp.result_type(total) if known else type(total).__name__
        if not known or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"Losses.{name} must be floating point, got {dtype}")
        if jnp.ndim(total) > highest_rank or jnp.size(total) == 0:
            wanted = "a scalar" if highest_rank == 0 else "a scalar or of shape [K]"
            raise ValueError(
                f"Losses.{name} must be {wanted}, got shape {jnp.shape(total)}: "
                "reduce it over the batch, for instance with jnp.mean"
            )
        if not (hasattr(count, "dtype") or isinstance(count, int | float)) or jnp.iscomplexobj(count):
            raise TypeError(f"the count of Losses.{name} must be a real number, got {type(count).__name__}")
        if jnp.shape(count) not in ((), jnp.shape(total)):
            raise ValueError(
                f"the count of Losses.{name} must be a scalar or of its total's shape {jnp.shape(total)}, "
                f"got shape {jnp.shape(count)}"
            )
        totals[name], counts[name] = jnp.asarray(total), count
    dtype = accumulation_dtype(*totals.values())
    convert = lambda values: Losses(**{name: jnp.asarray(value, dtype) for name, value in values.items()})
    return convert(totals), jax.lax.stop_gradient(convert(counts))


def check_utilities(losses: Losses, multiplier: jax.Array) -> None:
    """ValueError unless there is one multiplier for each utility."""
    if losses.retain.shape != multiplier.shape:
        raise ValueError(
            f"the retain loss has shape {losses.retain.shape} but initial_multiplier has shape "
            f"{multiplier.shape}: give initial_multiplier the shape of the retain loss, "
            "for instance jnp.ones(K) for K utilities"
        )


def is_usable(losses: Losses, log_losses: bool) -> jax.Array:
    """Whether all losses are finite, and positive where their logarithm is needed; a bool []."""
    values = jnp.concatenate([losses.forget[None], jnp.atleast_1d(losses.retain)])
    return jnp.all(jnp.isfinite(values) & (values > 0)) if log_losses else jnp.all(jnp.isfinite(values))


def bounded(loss: jax.Array, log_losses: bool) -> jax.Array:
    """The loss as it is bounded: itself, or its logarithm (0 where that is undefined)."""
    return jnp.log(jnp.where(loss > 0, loss, jnp.ones_like(loss))) if log_losses else loss


def cotangents(losses: Losses, multiplier: jax.Array, log_losses: bool, normalize_weights: bool) -> Losses:
    r"""The cotangents of (U, R) whose pull-back is the direction.

    (1, lambda) for U + <lambda, R>; (1 / U, lambda / R) for log U + <lambda, log R>; divided by
    1 + sum(lambda) when normalised.
    """
    dtype = losses.forget.dtype
    multiplier = multiplier.astype(dtype)
    forget, retain = jnp.ones([], dtype), multiplier
    if normalize_weights:
        total = 1 + jnp.sum(multiplier)
        forget, retain = forget / total, retain / total
    if log_losses:
        forget, retain = forget / losses.forget, retain / losses.retain
    return Losses(forget, retain)
