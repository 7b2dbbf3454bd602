"""EUPMU, the whole method: losses -> one weighted gradient -> inner optimiser -> dual step."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from eupmu_jax.method.constraints import Constraint, Tolerance, check_transformation
from eupmu_jax.method.controller import Controller, make_controller
from eupmu_jax.method.gradient import AxisName, all_finite, linearize, retain_loss
from eupmu_jax.method.losses import Losses, LossesFn, check_losses_fn, check_utilities
from eupmu_jax.method.state import SurgeryState, applied, is_sound, select, skipped
from eupmu_jax.method.types import Numbers, PyTree


class EupmuState(NamedTuple):
    """The multiplier's state and the inner optimiser's."""

    surgery: SurgeryState
    inner_state: PyTree


class EupmuUpdateFn(Protocol):
    """update(updates or None, state, params, *, batch, ...) -> (updates, state)."""

    def __call__(
        self,
        updates: optax.Updates | None,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]: ...


class Eupmu(optax.GradientTransformationExtraArgs):
    """A GradientTransformationExtraArgs whose ``update`` computes its own gradient: updates may be None."""

    # Optax types the first argument as a tree, which makes a type checker refuse the None of every step.
    update: EupmuUpdateFn  # pyright: ignore[reportIncompatibleVariableOverride]


def eupmu(
    losses_fn: LossesFn,
    inner: optax.GradientTransformation | None,
    constraint: Constraint,
    *,
    initial_multiplier: Numbers = 1.0,
    axis_name: AxisName = None,
) -> Eupmu:
    r"""EUPMU: an optimiser that forgets while the retain loss may rise only by so much, per step or in all.

    Computes its own gradient: one forward pass and one backward pass of the weighted losses at
    theta_t, whatever K is. With the objectives u = U and r_k = R_k (or their logarithms where the
    tolerance has ``log_losses=True``),

    .. math::
      d_t &= \big(\nabla u + \textstyle\sum_k \lambda_{t,k} \nabla r_k\big)(\theta_t) \;/\;
             \big(1 + \textstyle\sum_k \lambda_{t,k}\big) \\
      \theta_{t+1} &= \theta_t + \mathrm{inner}(d_t) \\
      \lambda_{t+1} &= \max(0, \mathrm{dual}(\lambda_t, -v_t))

    for a `Tolerance`, whose violation v_t its measure observes: v_t <= 0 means that it was kept and pushes
    the multiplier down, v_t > 0 pushes it up. "lagged" follows the released fast variant: v_t is known when
    step t + 1 has evaluated its losses, so lambda_{t+1} is formed there, before that step's gradient, and the
    first step has none. For a `Budget` a controller of log(lambda) takes the place of the dual step.

    Args:
      losses_fn: pure function (params, batch) -> `Losses`, jit-compiled or not. The forget loss is minimised:
        it must be low when the thing is forgotten. Randomness comes in through batch, so that the look-ahead
        sees the same noise and dropout masks.
      inner: the optimiser that turns the direction into updates, for instance ``optax.sgd(1e-2)``.
        None is the identity: then eupmu is the first link of a chain (not with measure="lookahead").
        Masks and partitions belong around inner, not around eupmu. Leaves that should stay get
        ``optax.set_to_zero()`` in an ``optax.partition``: ``optax.masked`` hands on what they are given.
      constraint: `Budget`, how much the retain loss may rise over the whole run, or `Tolerance`, how much in
        one step.
      initial_multiplier: lambda_0 >= 0 (> 0 for a budget), a scalar, or [K] for K utilities; its shape fixes
        K. 1.0 protects from the first step on. The multiplier is float32, or float64 where this is a float64
        array and x64 is enabled.
      axis_name: mesh axis or axes to reduce over inside shard_map or pmap, where every shard's losses
        are means over equally many examples, or `Mean`; () there for a model of its own on each
        device. None under jit, on any sharding.

    Returns:
      A GradientTransformationExtraArgs. ``init(params)`` -> state, arrays only: inner's state and
      O(K) scalars. ``update(updates, state, params, *, batch, **extra_args)`` -> (updates, state),
      updates in the dtypes of params: ``updates`` is None or a pytree like params that is added to
      d_t (a regulariser's gradient); ``batch`` goes to losses_fn, ``extra_args`` to inner.

      A step with a non-finite loss or gradient (or a loss <= 0 where its logarithm is needed, or a
      look-ahead that shows either, or a dual step that overflows) is skipped: zero updates,
      everything else kept and ``surgery_info(state).skipped_steps`` incremented. So is one whose gradient
      has a leaf that adds up to more than float32 holds. An inner optimiser that overflows by itself is
      seen by the look-ahead only.

      ``optax.MultiSteps`` around this sees the last mini-batch only: for a batch that is too large
      use `accumulated`. ``optax.apply_if_finite`` and other wrappers that inspect ``updates`` need a pytree
      of zeros in place of None; for a hyper-parameter in the state use
      ``optax.inject_hyperparams(lambda eps: eupmu(losses_fn, inner, Tolerance(eps)))(eps=schedule)``.
      Wrappers that refuse extra arguments (``optax.lookahead``, ``optax.contrib.sam``,
      ``optax.contrib.split_real_and_imaginary``, a line search behind this) raise: use them as inner
      where they take the direction alone, or not at all.

    Raises:
      TypeError: losses_fn, inner or constraint is something else; batch or params is missing; a leaf of
        params is not floating; losses_fn returns no Losses.
      ValueError: a look-ahead without inner; a constraint, multiplier or retain loss of different K; a
        multiplier < 0; updates unlike params. Losses that differ between the devices of a shard_map while
        params do not, or may (``check_vma=False``, pmap), without axis_name.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> def losses_fn(x, batch):
      ...     return eu.Losses(jnp.sum((x - batch["forget"]) ** 2), jnp.sum((x - batch["retain"]) ** 2))
      >>> batch = {"forget": jnp.array([2.0, 1.0]), "retain": jnp.array([0.0, -1.0])}
      >>> tx = eu.eupmu(losses_fn, optax.sgd(0.05), eu.Budget(0.5, baseline=1.0))
      >>> x = jnp.array([0.0, 0.0])
      >>> state = tx.init(x)
      >>> @jax.jit
      ... def step(x, state, batch):
      ...     updates, state = tx.update(None, state, x, batch=batch)
      ...     return optax.apply_updates(x, updates), state
      >>> for _ in range(300):
      ...     x, state = step(x, state, batch)
      >>> info = eu.surgery_info(state)  # the losses were 5 and 1 at the start
      >>> round(float(info.forget_loss), 2), round(float(info.retain_loss), 2)
      (2.57, 1.5)

    Source: EUPMU, arXiv 2510.22124; "directional", K utilities, budgets and skipping are ours.
    """
    check_losses_fn(losses_fn)
    controller = make_controller(constraint, initial_multiplier)
    if inner is None and isinstance(constraint, Tolerance) and constraint.measure == "lookahead":
        raise ValueError(
            "measure='lookahead' re-evaluates the retain loss after the inner optimiser's update: "
            "give inner, for instance optax.sgd(1e-2), or measure='lagged' or 'directional'"
        )
    if inner is None:
        inner = optax.identity()
    check_transformation(inner, "inner")
    return controlled(losses_fn, inner, controller, axis_name)


def controlled(
    losses_fn: LossesFn,
    inner: optax.GradientTransformation,
    controller: Controller,
    axis_name: AxisName = None,
) -> Eupmu:
    """The method under any `Controller`; `eupmu` is that of the controller of its constraint."""
    optimizer = optax.with_extra_args_support(inner)

    def init_fn(params):
        return EupmuState(controller.init(), optimizer.init(params))

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, *, batch: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, EupmuState]:
        _check_update_args(updates, state, params, batch)
        at = linearize(losses_fn, params, batch, axis_name)
        check_utilities(at.losses, state.surgery.multiplier)

        stepped = controller.before(state.surgery, at.losses)
        direction = at.pull_back(controller.weights(stepped, at.losses))
        if jax.tree.leaves(updates):
            direction = jax.tree.map(lambda d, u: d + u.astype(d.dtype), direction, updates)
        usable = controller.usable(at.losses) & all_finite(direction)

        def inner_update(direction, inner_state):
            updates, inner_state = optimizer.update(direction, inner_state, params, **extra_args)
            return optax.tree.cast_like(updates, params), inner_state

        def look_ahead(direction, inner_state):
            updates, _ = inner_update(direction, inner_state)
            ahead = retain_loss(losses_fn, optax.apply_updates(params, updates), batch, axis_name)
            valid = controller.usable(Losses(at.losses.forget, ahead))
            return controller.after(stepped, at.losses, ahead), valid

        def no_look(direction, inner_state):
            del direction, inner_state
            return stepped, jnp.zeros_like(usable)

        step = (direction, state.inner_state)
        if controller.observes == "lookahead":
            # Only scalars leave the look-ahead. Running inner again when the step is accepted costs
            # elementwise work; keeping its old and new state side by side would cost memory.
            stepped, usable = jax.lax.cond(usable, look_ahead, no_look, *step)
        elif controller.observes == "directional":
            stepped = controller.after(stepped, at.losses, -at.push_forward(direction).retain)
        usable &= is_sound(stepped, before=state.surgery)

        new_updates, inner_state = committed(usable & ~controller.holds(stepped), inner_update, *step)
        surgery = select(usable, applied(stepped, at.losses), skipped(state.surgery))
        return new_updates, EupmuState(surgery, inner_state)

    return Eupmu(init_fn, update_fn)


def committed(
    moving: jax.Array,
    inner_update: Callable[..., tuple[PyTree, PyTree]],
    direction: PyTree,
    inner_state: PyTree,
) -> tuple[PyTree, PyTree]:
    """inner_update(direction, inner_state) where `moving` holds, else updates of zero and the old state."""

    def keep(direction, inner_state):
        return optax.tree.zeros_like(direction), inner_state

    # A bad step must neither move the parameters nor enter the optimiser's moments, where a NaN would stay
    # for ever. Which way of choosing is free depends on the machine. A conditional of a TPU holds old and new
    # moments side by side: in all 1.4 x the memory of fine-tuning for 7B parameters on 16 chips, where a
    # select, fused into the update, takes 1.02 x. XLA does not fuse the select on a CPU (1.9 x for a small
    # network with Adam), and there the conditional takes 1.00 x. Without state there is nothing to hold: then
    # the select is fused into what applies the updates, which a conditional would write out and read again.
    def conditional(moving, *step):
        return jax.lax.cond(moving, inner_update, keep, *step)

    def selected(moving, *step):
        return select(moving, inner_update(*step), keep(*step))

    has_state = any(jnp.size(leaf) > 1 for leaf in jax.tree.leaves(inner_state))
    on_cpu = conditional if has_state else selected
    return jax.lax.platform_dependent(moving, direction, inner_state, cpu=on_cpu, default=selected)


def _check_update_args(updates: PyTree, state: PyTree, params: PyTree, batch: PyTree) -> None:
    if not isinstance(state, EupmuState):
        raise TypeError(f"state must come from the init of eupmu, got {type(state).__name__}")
    if batch is None:
        raise TypeError("eupmu.update needs batch=..., the batch that losses_fn(params, batch) takes")
    if params is None:
        raise TypeError("eupmu.update needs params: it differentiates the losses there")
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "eupmu sees only a part of params here, and losses_fn needs them all: instead of wrapping "
            "eupmu in optax.masked or optax.partition wrap the inner optimiser, eupmu(losses_fn, "
            "optax.partition({True: inner, False: optax.set_to_zero()}, mask), constraint); optax.masked "
            "hands the other leaves' direction on as it is"
        )
    if not jax.tree.leaves(updates):
        return
    structure, shapes = jax.tree.structure(updates), list(map(jnp.shape, jax.tree.leaves(updates)))
    if structure != jax.tree.structure(params) or shapes != list(map(jnp.shape, jax.tree.leaves(params))):
        raise ValueError(
            "updates must be None or a pytree like params (it is added to the direction), got "
            f"{structure} with shapes {shapes} for params {jax.tree.structure(params)}"
        )
