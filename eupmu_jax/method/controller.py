"""What steers the multiplier: one record of pure functions, whatever the constraint is."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from eupmu_jax.method import budget
from eupmu_jax.method.constraints import (
    Budget,
    Constraint,
    Tolerance,
    as_numbers,
    check_constraint,
    check_shape,
)
from eupmu_jax.method.losses import Losses, bounded, cotangents, is_usable, retain_alone
from eupmu_jax.method.state import SurgeryState, initial_state, select
from eupmu_jax.method.types import Numbers


class Controller(NamedTuple):
    """How a multiplier is steered: the method calls these without knowing what the constraint is.

    Attributes:
      init: () -> SurgeryState.
      before: (state, losses) -> state, with what the losses of this step say before its gradient is weighted.
      after: (state, losses, observed) -> state, with what the step came to: for "lookahead" R(theta_{t+1}) on
        the same batch, for "directional" -<grad R, d_t>, each [] or [K].
      weights: (state, losses) -> the cotangents of the losses, whose pull-back is the direction.
      usable: losses -> bool [], whether a step can be taken on them.
      holds: state -> bool [], whether the parameters must stay where they are, although the step is good.
      observes: what `after` is to be given; with "nothing" it is not called.
    """

    init: Callable[[], SurgeryState]
    before: Callable[[SurgeryState, Losses], SurgeryState]
    after: Callable[[SurgeryState, Losses, jax.Array], SurgeryState]
    weights: Callable[[SurgeryState, Losses], Losses]
    usable: Callable[[Losses], jax.Array]
    holds: Callable[[SurgeryState], jax.Array]
    observes: Literal["nothing", "lookahead", "directional"]


def make_controller(constraint: Constraint, initial_multiplier: Numbers) -> Controller:
    """The controller of a constraint; ValueError for a multiplier that does not go with it."""
    check_constraint(constraint)
    check_multiplier(initial_multiplier, isinstance(constraint, Budget))
    if isinstance(constraint, Budget):
        return budget_controller(constraint, initial_multiplier)
    return tolerance_controller(constraint, initial_multiplier)


def tolerance_controller(constraint: Tolerance, initial_multiplier: Numbers) -> Controller:
    """lambda_{t+1} = max(0, dual step from lambda_t along the violation of the step's tolerance)."""
    utilities = np.shape(initial_multiplier)
    optimizer = optax.with_extra_args_support(constraint.dual_optimizer or optax.adam(0.05))
    log_losses = constraint.log_losses
    if not callable(constraint.eps):
        check_shape(constraint.eps, utilities, "tolerance eps")

    def tolerance_at(step: jax.Array, dtype) -> jax.Array:
        eps = jnp.asarray(constraint.eps(step) if callable(constraint.eps) else constraint.eps)
        check_shape(eps, utilities, "tolerance eps")
        return eps.astype(dtype)

    def ascend(state: SurgeryState, violation: jax.Array) -> SurgeryState:
        violation = violation.astype(state.multiplier.dtype)
        updates, dual_state = optimizer.update(-violation, state.controller_state, state.multiplier)
        multiplier = state.multiplier + jnp.asarray(updates, state.multiplier.dtype)
        return state._replace(
            multiplier=jnp.maximum(multiplier, jnp.zeros_like(multiplier)),
            controller_state=dual_state,
            violation=violation,
        )

    def lagged(state: SurgeryState, losses: Losses) -> SurgeryState:
        """Along R_t - R_{t-1} - eps_{t-1}; none while there is no R_{t-1}."""
        dtype = losses.retain.dtype
        last = bounded(state.retain_loss.astype(dtype), log_losses)
        eps = tolerance_at(jnp.maximum(state.applied_steps - 1, 0), dtype)
        ascended = ascend(state, bounded(losses.retain, log_losses) - last - eps)
        return select(state.applied_steps > 0, ascended, state)

    def lookahead(state: SurgeryState, losses: Losses, ahead: jax.Array) -> SurgeryState:
        eps = tolerance_at(state.applied_steps, ahead.dtype)
        return ascend(state, bounded(ahead, log_losses) - bounded(losses.retain, log_losses) - eps)

    def directional(state: SurgeryState, losses: Losses, change: jax.Array) -> SurgeryState:
        eps = tolerance_at(state.applied_steps, change.dtype)
        return ascend(state, (change / losses.retain if log_losses else change) - eps)

    return Controller(
        init=lambda: initial_state(initial_multiplier, optimizer.init),
        before=lagged if constraint.measure == "lagged" else lambda state, losses: state,
        after=directional if constraint.measure == "directional" else lookahead,
        weights=partial(by_multiplier, log_losses=log_losses, normalize_weights=constraint.normalize_weights),
        usable=partial(is_usable, log_losses=log_losses),
        holds=lambda state: jnp.asarray(False),
        observes="nothing" if constraint.measure == "lagged" else constraint.measure,
    )


def by_multiplier(
    state: SurgeryState, losses: Losses, *, log_losses: bool, normalize_weights: bool
) -> Losses:
    """The weights (1, lambda), as cotangents of the losses."""
    return cotangents(losses, state.multiplier, log_losses, normalize_weights)


def budget_controller(constraint: Budget, initial_multiplier: Numbers) -> Controller:
    """lambda_t = lambda_0 times what the controller of the budget makes of the losses so far."""
    utilities = np.shape(initial_multiplier)
    check_shape(constraint.total, utilities, "budget total")
    if constraint.baseline is not None:
        check_shape(constraint.baseline, utilities, "budget baseline")

    def spend(state: SurgeryState, losses: Losses) -> SurgeryState:
        dtype = state.multiplier.dtype
        total = jnp.asarray(constraint.total, dtype)
        losses = jax.tree.map(lambda loss: loss.astype(dtype), losses)
        exponent, controlled = budget.control(state.controller_state, losses, total)
        factor = budget.foresight(controlled) * jnp.exp(exponent)
        return budget.followed(state, controlled, total)._replace(
            multiplier=jnp.asarray(initial_multiplier, dtype) * factor
        )

    def weights(state: SurgeryState, losses: Losses) -> Losses:
        forgetting = by_multiplier(state, losses, log_losses=False, normalize_weights=True)
        retaining = retain_alone(state.multiplier, losses.forget.dtype)
        return select(state.controller_state.is_paused, retaining, forgetting)

    def after(state: SurgeryState, losses: Losses, observed: jax.Array) -> SurgeryState:
        raise NotImplementedError("a budget observes nothing after a step")

    return Controller(
        init=lambda: initial_state(initial_multiplier, partial(budget.init, baseline=constraint.baseline)),
        before=spend,
        after=after,
        weights=weights,
        usable=partial(is_usable, log_losses=False),
        holds=lambda state: budget.is_measuring(state.controller_state),
        observes="nothing",
    )


def check_multiplier(initial_multiplier: Numbers, positive: bool) -> None:
    """Checks what is concrete: a traced hyper-parameter is taken as it is."""
    if np.ndim(initial_multiplier) > 1 or np.size(initial_multiplier) == 0:
        raise ValueError(
            f"initial_multiplier must be a scalar or of shape [K], got shape {np.shape(initial_multiplier)}"
        )
    if isinstance(initial_multiplier, Tracer):
        return
    concrete = as_numbers(initial_multiplier, "initial_multiplier")
    if not (np.all(np.isfinite(concrete)) and np.all(concrete >= 0)):
        raise ValueError(f"initial_multiplier must be finite and >= 0, got {initial_multiplier}")
    if positive and not np.all(concrete > 0):
        raise ValueError(
            f"initial_multiplier must be > 0 with a budget, which scales it, got {initial_multiplier}"
        )
