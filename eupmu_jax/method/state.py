"""What is remembered between steps, and how to read it wherever it sits in an optimiser's state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from eupmu_jax.method.losses import Losses, accumulation_dtype
from eupmu_jax.method.types import Numbers, PyTree


class SurgeryState(NamedTuple):
    """All that is remembered of the losses and the multiplier: O(K) scalars, in the multiplier's dtype.

    Attributes:
      multiplier: lambda, [] or [K].
      controller_state: the dual optimiser's, or a BudgetState.
      forget_loss, retain_loss: of the last applied step, so that a lagged violation has its predecessor.
      violation, infeasible: as in `SurgeryInfo`.
      applied_steps, skipped_steps: int32 [].
    """

    multiplier: jax.Array
    controller_state: PyTree
    forget_loss: jax.Array
    retain_loss: jax.Array
    violation: jax.Array
    infeasible: jax.Array
    applied_steps: jax.Array
    skipped_steps: jax.Array


class SurgeryInfo(NamedTuple):
    """What the last applied step saw: the return value of `surgery_info`.

    Attributes:
      forget_loss: U(theta_t), [], in the loss's units; never a logarithm.
      retain_loss: R(theta_t), [] or [K], likewise.
      violation: of the latest dual step, [] or [K]; <= 0 where the constraint was kept. With a tolerance in
        units of the (log) retain loss per step, per unit of step length for the directional measure; 0
        before the first dual step. With a budget it is smoothed R - R_0 - total, in the loss's units.
      multiplier: as `multiplier` returns it, [] or [K].
      skipped_steps: int32 [], bad steps since init; a skipped step changes nothing else here.
      infeasible: bool, [] or [K]: whether the budget looks out of reach, since the retain loss has
        stayed above it although (nearly) the whole weight is on it: lower the learning rate or
        raise the budget. It is cleared when the loss comes down; always False without a budget.

    The others are float32, or float64 where the multiplier is.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> surgery = eu.implicit_surgery(eu.Tolerance(0.0))
      >>> eu.surgery_info(surgery.init(jnp.zeros(3))).multiplier
      Array(1., dtype=float32)
    """

    forget_loss: jax.Array
    retain_loss: jax.Array
    violation: jax.Array
    multiplier: jax.Array
    skipped_steps: jax.Array
    infeasible: jax.Array


def initial_state(initial_multiplier: Numbers, controller_state: PyTree) -> SurgeryState:
    """lambda_0, and zeros for what has not been observed yet; controller_state is a function of lambda_0."""
    has_dtype = hasattr(initial_multiplier, "dtype")
    dtype = accumulation_dtype(jnp.asarray(initial_multiplier)) if has_dtype else jnp.float32
    # A copy: the state may be donated, the caller's array must survive that.
    multiplier = jnp.array(initial_multiplier, dtype, copy=True)
    return SurgeryState(
        multiplier=multiplier,
        controller_state=controller_state(jnp.copy(multiplier)),
        forget_loss=jnp.zeros([], multiplier.dtype),
        retain_loss=jnp.zeros_like(multiplier),
        violation=jnp.zeros_like(multiplier),
        infeasible=jnp.zeros(multiplier.shape, bool),
        applied_steps=jnp.zeros([], jnp.int32),
        skipped_steps=jnp.zeros([], jnp.int32),
    )


def applied(state: SurgeryState, losses: Losses) -> SurgeryState:
    """`state` after a step that was applied at these losses."""
    return state._replace(
        forget_loss=losses.forget.astype(state.forget_loss.dtype),
        retain_loss=losses.retain.astype(state.retain_loss.dtype),
        applied_steps=optax.safe_increment(state.applied_steps),
    )


def skipped(state: SurgeryState) -> SurgeryState:
    """`state` after a step that was not applied: everything kept, the step counted."""
    return state._replace(skipped_steps=optax.safe_increment(state.skipped_steps))


def is_sound(after: SurgeryState, before: SurgeryState) -> jax.Array:
    """Whether a dual step left the multiplier finite and made nothing in the controller's state non-finite.

    A finite but huge violation would else sit in Adam's second moment as inf and freeze the multiplier.
    """
    sound = jnp.all(jnp.isfinite(after.multiplier))
    pairs = zip(
        jax.tree.leaves(after.controller_state), jax.tree.leaves(before.controller_state), strict=True
    )
    for new, old in pairs:
        if jnp.issubdtype(new.dtype, jnp.floating):
            sound &= jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))
    return sound


def select(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """`yes` where the condition (bool []) holds, else `no`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def surgery_state(state: PyTree) -> SurgeryState:
    """The one SurgeryState inside an optimiser's state; ValueError if there is none or several."""
    is_surgery = lambda node: isinstance(node, SurgeryState)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_surgery) if is_surgery(node)]
    if len(found) != 1:
        raise ValueError(
            "expected exactly one state of eupmu, implicit_surgery or saddle_point in the optimiser's state, "
            f"found {len(found)} in {type(state).__name__}"
            + (": pass the sub-state of the one you mean" if found else "")
        )
    return found[0]


def multiplier(state: PyTree) -> jax.Array:
    """The multiplier that the next gradient is weighted with, wherever it sits in `state`.

    After update t it is lambda_{t+1} for the look-ahead and directional measures and for
    `implicit_surgery` and `saddle_point`. The lagged measure of `eupmu` takes its dual step at the start of
    a step, so there it is the lambda_t that update t used.

    Args:
      state: the state of `eupmu`, `implicit_surgery` or `saddle_point`, or of any chain, mask, partition,
        inject_hyperparams, ... around one of them. For an nnx.Optimizer pass
        ``nnx.as_pure(optimizer.opt_state)``.

    Returns:
      float32 (float64 where initial_multiplier is), shape [] or [K]; >= 0.

    Raises:
      ValueError: if there is no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> tx = optax.chain(eu.implicit_surgery(eu.Tolerance(0.01), initial_multiplier=0.5), optax.sgd(0.1))
      >>> eu.multiplier(tx.init(jnp.zeros(3)))
      Array(0.5, dtype=float32)

    Source: lambda of arXiv 2510.22124; ``relu(w)`` in the released code.
    """
    return surgery_state(state).multiplier


def surgery_info(state: PyTree) -> SurgeryInfo:
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
      >>> tx = eu.eupmu(losses_fn, optax.sgd(0.1), eu.Tolerance(0.0))
      >>> x = jnp.array(0.0)
      >>> _, state = tx.update(None, tx.init(x), x, batch=())
      >>> info = eu.surgery_info(state)
      >>> float(info.retain_loss), int(info.skipped_steps)
      (1.0, 0)
    """
    surgery = surgery_state(state)
    return SurgeryInfo(
        surgery.forget_loss,
        surgery.retain_loss,
        surgery.violation,
        surgery.multiplier,
        surgery.skipped_steps,
        surgery.infeasible,
    )
