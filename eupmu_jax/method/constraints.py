"""What a run is held to: a tolerance for each step, or a budget for all of it."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from eupmu_jax.method.types import Numbers

Measure = Literal["lagged", "lookahead", "directional"]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    r"""A bound for each step, the paper's: how much the retain loss may rise in one.

    .. math:: v_t = r_k(\theta_{t+1}) - r_k(\theta_t) - \epsilon_{t,k} \le 0

    with r = R, or log R where ``log_losses``. The violation v_t is what the measure observes; <= 0 means
    that the tolerance was kept. Every step may use its tolerance, so they add up: for a bound on the
    whole run use a `Budget`.

    ===============  =====================================  =====================  ==================
    measure          v_t + eps_t                            extra cost per step    sees
    ===============  =====================================  =====================  ==================
    "lagged"         r_{t+1}(theta_{t+1}) - r_t(theta_t),   none                   momentum, clipping,
                     each on its own batch                                         decay, curvature,
                                                                                   batch noise
    "lookahead"      r(theta_{t+1}) - r(theta_t) on the     one retain forward,    the same, without
                     same batch                             inner's arithmetic     batch noise
                                                            twice
    "directional"    -<grad r, d_t>(theta_t), by a jvp      one tangent forward    first order only
    ===============  =====================================  =====================  ==================

    Args:
      eps: the allowed increase of each (log) retain loss per step: a float, [K] numbers, or an optax
        schedule of the number of steps applied. Negative demands a decrease; with log losses it is
        relative (0.01 is 1%). For "directional" it is the increase per unit of step length along d, about
        the per-step one over the learning rate. A decrease that cannot be had makes the multiplier grow for
        as long as it is asked for: forget first, repair later. -0.01 to -0.03 nats of a cross-entropy is a
        start.
      measure: how the violation is observed. A look-ahead can be satisfied by fitting the very batch: with
        eps 0 it lets go of the retain set, with a small negative one it does not, and "lagged" holds with
        either. "directional" needs losses that can be forward-differentiated: no ``jax.custom_vjp``.
      dual_optimizer: any optax transformation, fed -v_t as the gradient of the multiplier, which is then
        projected to >= 0. None is ``optax.adam(0.05)``: whatever the scale of the losses, a steady violation
        moves the multiplier by 0.05 a step, and there is no decay that would pull it to a fixed point of its
        own. The released code's is ``optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0))``.
      log_losses: optimise and bound the logarithms of the losses: weights and eps become scale-free, and a
        retain loss is protected the more the smaller it is. A logarithm has no floor, so that a loss which
        can be fitted to zero pulls without end (1 / U grows), and a loss <= 0 has every step skipped.
      normalize_weights: divide the weights by 1 + sum(multiplier), so that a large multiplier does not
        lengthen the step.

    Raises:
      TypeError: eps is not made of real numbers; dual_optimizer is no transformation.
      ValueError: eps is not finite or of rank > 1; a measure of another name.

    Example:
      >>> import eupmu_jax as eu
      >>> eu.Tolerance(-0.01, measure="lookahead").eps
      -0.01

    Source: arXiv 2510.22124; "lagged" is its code's fast variant. "directional" and K utilities are ours.
    """

    eps: Numbers | optax.Schedule
    _: dataclasses.KW_ONLY
    measure: Measure = "lagged"
    dual_optimizer: optax.GradientTransformation | None = None
    log_losses: bool = False
    normalize_weights: bool = True

    def __post_init__(self):
        object.__setattr__(self, "eps", plain_numbers(self.eps, "tolerance eps"))
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}; got {self.measure!r}")
        for name in ("log_losses", "normalize_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.dual_optimizer is not None:
            check_transformation(self.dual_optimizer, "dual_optimizer")


@dataclasses.dataclass(frozen=True)
class Budget:
    r"""A bound for the whole run: how much the retain loss may rise in all.

    .. math:: R_k(\theta_T) - R_k(\theta_0) \le \delta_k

    A controller of log(multiplier) spends the budget and stays there, whatever the inner optimiser, learning
    rate and schedule are. The losses are raw, the weights normalised, and R is observed on the batches
    of the steps: no look-ahead, since a batch that was just stepped on looks better than the rest. It aims at
    the budget itself, and noisy batches lift R above it: by a tenth of the budget as a rule, by a third where
    one batch errs by more than a budget. `unlearn` measures at the end and takes back what is over; after
    steps of your own, measure. Where the learning rate alone keeps the retain loss above the budget,
    ``surgery_info(state).infeasible`` says so. The multiplier moves between e^-5 (a tenth of it when all is
    forgotten) and e^8 times its initial value: scale that by U / R.

    Draw retain batches independently, as `unlearn` does: in reshuffled passes a batch holds what was not
    trained on for longest, its loss lies above the whole set's, and less than the budget is spent. What is
    watched is the training loss of the retain set: for a budget on unseen data let the retain loss have the
    value of held-out examples and the gradient of training ones.

    Args:
      total: delta > 0, in the loss's units (nats of a cross-entropy; for a relative one 0.05 * R_0): a
        float, or [K] numbers.
      baseline: R_0, a float or [K] numbers, the mean retain loss over the retain set before the first step.
        None: `unlearn` measures it where the set is arrays; elsewhere it is the mean of the first ten
        batches, during which the parameters stand still. Measure it yourself for K utilities, or where a
        budget is small beside the spread between batches: the baseline's error is spent or withheld.

    Raises:
      TypeError: what is not made of real numbers.
      ValueError: a total that is not > 0; what is not finite, or of rank > 1; two different K.

    Example:
      >>> import eupmu_jax as eu
      >>> eu.Budget(0.1)
      Budget(total=0.1, baseline=None)
    """

    total: Numbers
    _: dataclasses.KW_ONLY
    baseline: Numbers | None = None

    def __post_init__(self):
        object.__setattr__(self, "total", plain_numbers(self.total, "budget total"))
        if callable(self.total):
            raise TypeError("budget total must be a number or [K] of them: it is for the whole run")
        numbers = np.ones(()) if isinstance(self.total, Tracer) else np.asarray(self.total)
        if not np.all(numbers > 0):
            raise ValueError(
                "budget total must be > 0, the rise of the retain loss that the whole run may cost, "
                f"got {self.total}"
            )
        # Squares of it are formed in float32.
        if not np.all((numbers >= 1e-12) & (numbers <= 1e12)):
            raise ValueError(f"budget total must lie in [1e-12, 1e12], got {self.total}")
        if self.baseline is None:
            return
        object.__setattr__(self, "baseline", plain_numbers(self.baseline, "budget baseline"))
        shapes = {np.shape(self.total), np.shape(self.baseline)} - {()}
        if callable(self.baseline) or len(shapes) > 1:
            raise ValueError(f"budget baseline must be a number or as many as the total, got {self.baseline}")


Constraint = Tolerance | Budget


def check_constraint(constraint: Constraint) -> None:
    """TypeError with what to write instead where it is neither."""
    if not isinstance(constraint, Tolerance | Budget):
        raise TypeError(
            "constraint must be eupmu_jax.Budget(total), how much the retain loss may rise over the whole "
            f"run, or eupmu_jax.Tolerance(eps), how much in one step; got {constraint!r}"
        )


def plain_numbers(value: Numbers | optax.Schedule, name: str):
    """A concrete number as a float and [K] as a tuple, which can be compared and written as JSON.

    A schedule, and a hyper-parameter that is traced, are left as they are.
    """
    if callable(value) or isinstance(value, Tracer):
        return value
    numbers = as_numbers(value, name)
    if numbers.ndim > 1 or numbers.size == 0:
        raise ValueError(f"{name} must be a number or of shape [K], got shape {numbers.shape}")
    if not np.all(np.isfinite(numbers)):
        raise ValueError(f"{name} must be finite, got {value}")
    return tuple(numbers.tolist()) if numbers.ndim else float(numbers)


def as_numbers(value: Numbers, name: str) -> np.ndarray:
    """A concrete value in float64; TypeError unless it is made of real numbers."""
    numbers = np.asarray(value)
    if not (jnp.issubdtype(numbers.dtype, jnp.floating) or jnp.issubdtype(numbers.dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number or an array of them, got {value!r}")
    return numbers.astype(np.float64)


def check_shape(value: Numbers, utilities: tuple[int, ...], name: str) -> None:
    """ValueError for what fits no retain loss of shape `utilities`."""
    if np.shape(value) not in ((), utilities):
        raise ValueError(
            f"{name} must be a scalar or have the shape {utilities} of the retain loss and its multiplier, "
            f"got shape {np.shape(value)}"
        )


def check_fits(constraint: Constraint, initial_multiplier: Numbers, utilities: tuple[int, ...]) -> None:
    """ValueError for a constraint or a multiplier that fits no retain loss of shape `utilities`."""
    check_shape(initial_multiplier, utilities, "initial_multiplier")
    if isinstance(constraint, Budget):
        check_shape(constraint.total, utilities, "budget total")
        if constraint.baseline is not None:
            check_shape(constraint.baseline, utilities, "budget baseline")
    elif not callable(constraint.eps):
        check_shape(constraint.eps, utilities, "tolerance eps")


def check_transformation(transformation: object, name: str) -> None:
    """TypeError for what is no transformation."""
    if not isinstance(transformation, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got "
            f"{type(transformation).__name__} (of optax.MultiSteps pass the gradient_transformation())"
        )
