"""The multiplier: its state, the violation that drives it, and the projected dual step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from eupmu_jax.method import budget as budget_lib
from eupmu_jax.method.losses import Losses, accumulation_dtype, objective


class SurgeryState(NamedTuple):
    """All that implicit surgery remembers: O(K) scalars, in the multiplier's dtype.

    The losses are those of the last applied step, so a lagged violation has its predecessor.
    `dual_state` is the dual optimiser's, or a BudgetState.
    """

    multiplier: jax.Array
    dual_state: Any
    forget_loss: jax.Array
    retain_loss: jax.Array
    violation: jax.Array
    infeasible: jax.Array
    applied_steps: jax.Array
    skipped_steps: jax.Array


class SurgeryInfo(NamedTuple):
    """What the last applied step saw: the return value of `surgery_info`.

    Args:
      forget_loss: U(theta_t), shape [], in the loss's units; never a logarithm.
      retain_loss: R(theta_t), shape [] or [K], likewise.
      violation: of the latest dual step, [] or [K]; <= 0 where the tolerance was kept. In units of
        the (log) retain loss per step, per unit of step length for the directional measure; 0
        before the first dual step. With a budget it is smoothed R - R_0 - budget, in the loss's
        units.
      multiplier: as `multiplier` returns it, [] or [K].
      skipped_steps: int32 [], bad steps since init; a skipped step changes nothing else here.
      infeasible: bool, [] or [K]: whether the budget looks out of reach, since the retain loss has
        stayed above it although (nearly) the whole weight is on it: lower the learning rate or
        raise the budget. It is cleared when the loss comes down; always False without a budget.

    The others are float32, or float64 where the multiplier is.

    Source: ours.
    """

    forget_loss: jax.Array
    retain_loss: jax.Array
    violation: jax.Array
    multiplier: jax.Array
    skipped_steps: jax.Array
    infeasible: jax.Array


class Dual(NamedTuple):
    """The settings of the dual side, checked once.

    Either a tolerance for each step, whose violation the optimizer follows (`log_losses` says what
    it bounds), or a budget for all steps together, whose controller has no settings.
    """

    tolerance: Any
    optimizer: optax.GradientTransformationExtraArgs
    initial_multiplier: Any
    log_losses: bool
    normalize_weights: bool
    budget: Any
    retain_baseline: Any


def make_dual(
    tolerance,
    dual_optimizer,
    initial_multiplier,
    log_losses,
    normalize_weights,
    budget=None,
    retain_baseline=None,
) -> Dual:
    """Checks what is concrete (a traced hyper-parameter is taken as it is) and fills the defaults."""
    check_tolerance(tolerance, np.shape(initial_multiplier))
    check_budget(budget, retain_baseline, np.shape(initial_multiplier))
    if budget is not None:
        clashes = {
            "a tolerance": callable(tolerance) or (not isinstance(tolerance, Tracer) and np.any(tolerance)),
            "a dual_optimizer": dual_optimizer is not None,
            "log_losses=True": log_losses,
            "normalize_weights=False": normalize_weights is not None and not normalize_weights,
        }
        if refused := [what for what, given in clashes.items() if given]:
            raise ValueError(
                f"budget cannot be combined with {' and '.join(refused)}: it has a controller of its own, "
                "which bounds the raw retain loss over the whole run; drop one of them"
            )
    if np.ndim(initial_multiplier) > 1 or np.size(initial_multiplier) == 0:
        raise ValueError(
            f"initial_multiplier must be a scalar or of shape [K], got shape {np.shape(initial_multiplier)}"
        )
    if not isinstance(initial_multiplier, Tracer):
        concrete = as_numbers(initial_multiplier, "initial_multiplier")
        if not (np.all(np.isfinite(concrete)) and np.all(concrete >= 0)):
            raise ValueError(f"initial_multiplier must be finite and >= 0, got {initial_multiplier}")
        if budget is not None and not np.all(concrete > 0):
            raise ValueError(
                f"initial_multiplier must be > 0 with a budget, which scales it, got {initial_multiplier}"
            )
    if dual_optimizer is None:
        dual_optimizer = optax.adam(0.05)
    check_transformation(dual_optimizer, "dual_optimizer")
    return Dual(
        tolerance,
        optax.with_extra_args_support(dual_optimizer),
        initial_multiplier,
        bool(log_losses),
        True if normalize_weights is None else bool(normalize_weights),
        budget,
        retain_baseline,
    )


def check_transformation(transformation, name: str) -> None:
    if not isinstance(transformation, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation (or None), got "
            f"{type(transformation).__name__} (of optax.MultiSteps pass the gradient_transformation())"
        )


def as_numbers(value, name: str) -> np.ndarray:
    """A concrete value in float64; TypeError unless it is made of real numbers."""
    numbers = np.asarray(value)
    if not (jnp.issubdtype(numbers.dtype, jnp.floating) or jnp.issubdtype(numbers.dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number or an array of them, got {value!r}")
    return numbers.astype(np.float64)


def check_tolerance(tolerance, utilities: tuple[int, ...]) -> None:
    """ValueError for a tolerance that is not finite or fits no retain loss of shape `utilities`."""
    if callable(tolerance):
        return
    if np.shape(tolerance) not in ((), utilities):
        raise ValueError(
            f"tolerance must be a scalar or have the shape {utilities} of the multiplier, "
            f"got shape {np.shape(tolerance)}"
        )
    concrete = not isinstance(tolerance, Tracer)
    if concrete and not np.all(np.isfinite(as_numbers(tolerance, "tolerance"))):
        raise ValueError(f"tolerance must be finite, got {tolerance}")


def check_budget(budget, retain_baseline, utilities: tuple[int, ...]) -> None:
    """ValueError for a budget or baseline that cannot be kept by a retain loss of shape `utilities`."""
    if budget is None:
        if retain_baseline is not None:
            raise ValueError("retain_baseline is where a budget counts from: give budget=, too")
        return
    for name, value in (("budget", budget), ("retain_baseline", retain_baseline)):
        if value is None:
            continue
        if np.shape(value) not in ((), utilities):
            raise ValueError(
                f"{name} must be a scalar or have the shape {utilities} of the multiplier, "
                f"got shape {np.shape(value)}"
            )
        if isinstance(value, Tracer):
            continue
        numbers = as_numbers(value, name)
        if not np.all(np.isfinite(numbers)):
            raise ValueError(f"{name} must be finite, got {value}")
        if name == "budget" and not np.all(numbers > 0):
            raise ValueError(
                f"budget must be > 0, the rise of the retain loss that the whole run may cost, got {value}"
            )


def init(dual: Dual) -> SurgeryState:
    """lambda_0, and zeros for what has not been observed yet."""
    given = dual.initial_multiplier
    dtype = accumulation_dtype(jnp.asarray(given)) if hasattr(given, "dtype") else jnp.float32
    # A copy: the state may be donated, the caller's array and the dual state must survive that.
    multiplier = jnp.array(given, dtype, copy=True)
    return SurgeryState(
        multiplier=multiplier,
        dual_state=(
            dual.optimizer.init(jnp.copy(multiplier))
            if dual.budget is None
            else budget_lib.init(multiplier, dual.retain_baseline)
        ),
        forget_loss=jnp.zeros([], multiplier.dtype),
        retain_loss=jnp.zeros_like(multiplier),
        violation=jnp.zeros_like(multiplier),
        infeasible=jnp.zeros(multiplier.shape, bool),
        applied_steps=jnp.zeros([], jnp.int32),
        skipped_steps=jnp.zeros([], jnp.int32),
    )


def tolerance_at(dual: Dual, step: jax.Array, dtype) -> jax.Array:
    """eps_t, shape [] or [K]."""
    tolerance = dual.tolerance(step) if callable(dual.tolerance) else dual.tolerance
    check_tolerance(tolerance, np.shape(dual.initial_multiplier))
    return jnp.asarray(tolerance, dtype)


def violation(before: jax.Array, after: jax.Array, tolerance: jax.Array, log_losses: bool) -> jax.Array:
    """R_after - R_before - eps (of logarithms in log space): signed, <= 0 means satisfied."""
    return objective(after, log_losses) - objective(before, log_losses) - tolerance


def ascend(dual: Dual, state: SurgeryState, violation: jax.Array) -> SurgeryState:
    """lambda_{t+1} = max(0, dual step from lambda_t along the violation)."""
    violation = violation.astype(state.multiplier.dtype)
    updates, dual_state = dual.optimizer.update(-violation, state.dual_state, state.multiplier)
    multiplier = state.multiplier + jnp.asarray(updates, state.multiplier.dtype)
    return state._replace(
        multiplier=jnp.maximum(multiplier, jnp.zeros_like(multiplier)),
        dual_state=dual_state,
        violation=violation,
    )


def ascend_lagged(dual: Dual, state: SurgeryState, losses: Losses) -> SurgeryState:
    """The dual step from R_t: along R_t - R_{t-1} - eps_{t-1}, or the budget's.

    None while there is no R_{t-1}, or no R_0.
    """
    if dual.budget is not None:
        return spend(dual, state, losses)
    dtype = losses.retain.dtype
    lagged = violation(
        state.retain_loss.astype(dtype),
        losses.retain,
        tolerance_at(dual, jnp.maximum(state.applied_steps - 1, 0), dtype),
        dual.log_losses,
    )
    return select(state.applied_steps > 0, ascend(dual, state, lagged), state)


def spend(dual: Dual, state: SurgeryState, losses: Losses) -> SurgeryState:
    """The budget controller's step after an observation of the losses."""
    dtype = state.multiplier.dtype
    budget = jnp.asarray(dual.budget, dtype)
    exponent, dual_state = budget_lib.control(
        state.dual_state, jax.tree.map(lambda loss: loss.astype(dtype), losses), budget
    )
    factor = budget_lib.foresight(dual_state) * jnp.exp(exponent)
    return follow(state, dual_state, budget)._replace(
        multiplier=jnp.asarray(dual.initial_multiplier, dtype) * factor
    )


def follow(state: SurgeryState, dual_state: budget_lib.BudgetState, budget: jax.Array) -> SurgeryState:
    """`state` with what a step of the budget's controller found."""
    return state._replace(
        dual_state=dual_state,
        violation=budget_lib.violation(dual_state, budget),
        infeasible=budget_lib.looks_infeasible(dual_state),
    )


def is_measuring(state: SurgeryState) -> jax.Array:
    """Whether the parameters must stay where they are, for R_0 is being estimated; a bool []."""
    if isinstance(state.dual_state, budget_lib.BudgetState):
        return budget_lib.is_measuring(state.dual_state)
    return jnp.asarray(False)


def is_sound(after: SurgeryState, before: SurgeryState) -> jax.Array:
    """Whether a dual step left the multiplier finite and made nothing in the dual state non-finite.

    A finite but huge violation would else sit in Adam's second moment as inf and freeze lambda.
    """
    sound = jnp.all(jnp.isfinite(after.multiplier))
    for new, old in zip(jax.tree.leaves(after.dual_state), jax.tree.leaves(before.dual_state), strict=True):
        if jnp.issubdtype(new.dtype, jnp.floating):
            sound &= jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))
    return sound


def accept(state: SurgeryState, losses: Losses) -> SurgeryState:
    """`state` after a step that was applied at these losses."""
    return state._replace(
        forget_loss=losses.forget.astype(state.forget_loss.dtype),
        retain_loss=losses.retain.astype(state.retain_loss.dtype),
        applied_steps=optax.safe_increment(state.applied_steps),
    )


def skip(state: SurgeryState) -> SurgeryState:
    """`state` after a step that was not applied: everything kept, the step counted."""
    return state._replace(skipped_steps=optax.safe_increment(state.skipped_steps))


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """`yes` where the condition (bool []) holds, else `no`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def find(state: Any) -> SurgeryState:
    """The one SurgeryState inside an optimiser's state; ValueError if there is none or several."""
    is_surgery = lambda node: isinstance(node, SurgeryState)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_surgery) if is_surgery(node)]
    if len(found) != 1:
        raise ValueError(
            f"expected exactly one state of eupmu or implicit_surgery in the optimiser's state, "
            f"found {len(found)} in {type(state).__name__}"
            + (": pass the sub-state of the one you mean" if found else "")
        )
    return found[0]


def multiplier(state: Any) -> jax.Array:
    """The multiplier that the next gradient is weighted with, wherever it sits in `state`.

    After update t it is lambda_{t+1} for the look-ahead and directional measures and for
    `implicit_surgery`. The lagged measure of `eupmu` takes its dual step at the start of a step, so
    there it is the lambda_t that update t used.

    Args:
      state: the state of `eupmu` or `implicit_surgery`, or of any chain, mask, partition,
        inject_hyperparams, ... around one of them. For an nnx.Optimizer pass
        ``nnx.as_pure(optimizer.opt_state)``.

    Returns:
      float32 (float64 where initial_multiplier is), shape [] or [K]; >= 0.

    Raises:
      ValueError: if there is no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> tx = optax.chain(eu.implicit_surgery(initial_multiplier=0.5), optax.sgd(0.1))
      >>> eu.multiplier(tx.init(jnp.zeros(3)))
      Array(0.5, dtype=float32)

    Source: lambda of arXiv 2510.22124; ``relu(w)`` in the released code.
    """
    return find(state).multiplier


def surgery_info(state: Any) -> SurgeryInfo:
    """What the last applied step saw, as arrays: cheap to return from a compiled step and to log.

    Args:
      state: as for `multiplier`.

    Returns:
      A `SurgeryInfo`: forget_loss, retain_loss, violation, multiplier, skipped_steps and
      infeasible; zeros before the first step.

    Raises:
      ValueError: if there is no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses((x - 1) ** 2, (x + 1) ** 2)
      >>> tx = eu.eupmu(losses_fn, optax.sgd(0.1))
      >>> x = jnp.array(0.0)
      >>> _, state = tx.update(None, tx.init(x), x, batch=())
      >>> info = eu.surgery_info(state)
      >>> float(info.retain_loss), int(info.skipped_steps)
      (1.0, 0)

    Source: ours.
    """
    surgery = find(state)
    return SurgeryInfo(
        surgery.forget_loss,
        surgery.retain_loss,
        surgery.violation,
        surgery.multiplier,
        surgery.skipped_steps,
        surgery.infeasible,
    )
