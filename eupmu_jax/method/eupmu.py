"""EUPMU, the whole method: losses -> one weighted gradient -> inner optimiser -> dual step."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax.method import state as dual_lib
from eupmu_jax.method.gradient import AxisName, all_finite, linearize, retain_loss
from eupmu_jax.method.losses import (
    Losses,
    LossesFn,
    check_losses_fn,
    check_utilities,
    is_usable,
    weights,
)

MEASURES = ("lookahead", "lagged", "directional")


class EupmuState(NamedTuple):
    """The multiplier's state and the inner optimiser's."""

    surgery: dual_lib.SurgeryState
    inner_state: Any


def eupmu(
    losses_fn: LossesFn,
    inner: optax.GradientTransformation | None = None,
    *,
    tolerance: optax.ScalarOrSchedule = 0.0,
    measure: str = "lookahead",
    dual_optimizer: optax.GradientTransformation | None = None,
    initial_multiplier: chex.Numeric = 1.0,
    log_losses: bool | None = None,
    normalize_weights: bool | None = None,
    budget: chex.Numeric | None = None,
    retain_baseline: chex.Numeric | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EUPMU: an optimiser that forgets while the retain loss may rise only by so much, per step or in all.

    Computes its own gradient: one forward pass and one backward pass of the weighted losses at
    theta_t, whatever K is. With the objectives u = U and r_k = R_k (or their logarithms where
    ``log_losses=True``) and eps_t the tolerance,

    .. math::
      d_t &= \big(\nabla u + \textstyle\sum_k \lambda_{t,k} \nabla r_k\big)(\theta_t) \;/\;
             \big(1 + \textstyle\sum_k \lambda_{t,k}\big) \\
      \theta_{t+1} &= \theta_t + \mathrm{inner}(d_t) \\
      v_{t} &= \text{what the measure observes, minus } \epsilon_t \\
      \lambda_{t+1} &= \max(0, \mathrm{dual}(\lambda_t, -v_t))

    (undivided where ``normalize_weights=False``). A violation v_t <= 0 means that the tolerance was
    kept; it pushes the multiplier down, v_t > 0 pushes it up. The measures:

    =============  =====================================  =====================  ==================
    measure        v_t + eps_t                            extra cost per step    sees
    =============  =====================================  =====================  ==================
    "lookahead"    r(theta_{t+1}) - r(theta_t) on the     one retain forward,    momentum, clipping,
                   same batch                             inner's arithmetic     decay, curvature
                                                          twice
    "lagged"       r_{t+1}(theta_{t+1}) - r_t(theta_t),   none                   the same, with
                   each on its own batch                                         batch noise
    "directional"  -<grad r, d_t>(theta_t), by a jvp      one tangent forward    first order only
    =============  =====================================  =====================  ==================

    "lagged" follows the released fast variant: v_t is known when step t + 1 has evaluated its losses,
    so lambda_{t+1} is formed there, before that step's gradient, and the first step has none. A
    look-ahead on the same batch can be satisfied by fitting that batch: with tolerance 0 it lets go of
    the retain set, with a small negative one it does not, and "lagged" holds with either. "directional"
    needs losses that can be forward-differentiated: no ``jax.custom_vjp``.

    Args:
      losses_fn: pure function (params, batch) -> `Losses`, jit-compiled or not. Randomness comes in
        through batch, so that the look-ahead sees the same noise and dropout masks.
      inner: the optimiser that turns the direction into updates, for instance ``optax.sgd(1e-2)``.
        None is the identity: then eupmu is the first link of a chain ("lagged" and "directional"
        only). Masks and partitions belong around inner, not around eupmu.
      tolerance: eps, the increase of each (log, if log_losses) retain loss that one step is
        allowed: a float, an array [K], or an optax schedule of the number of steps applied. Negative
        demands a decrease; log losses make it relative (0.01 is 1%). For "directional" it is the
        increase per unit of step length along d, about the per-step one over the learning rate. A
        decrease that cannot be had makes the multiplier grow for as long as it is asked for: forget
        first, repair later. -0.01 to -0.03 nats of a cross-entropy is a start (experiments/README.md).
      measure: how the violation is observed; see above.
      dual_optimizer: any optax transformation, fed -v_t as the gradient of the multiplier, which is
        then projected to >= 0. None is ``optax.adam(0.05)``: whatever the scale of the losses, a
        steady violation moves the multiplier by 0.05 a step (a jump after a quiet phase by several
        times that, and momentum turns it round some steps late), and there is no decay that would
        pull it to a fixed point of its own. The released code's is
        ``optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0))``.
      initial_multiplier: lambda_0 >= 0, a scalar, or [K] for K utilities; its shape fixes K. The
        default 1.0 protects from the first step on. The multiplier is float32, or float64 where this
        is a float64 array and x64 is enabled.
      log_losses: optimise and bound the logarithms of the losses, which makes weights and tolerance
        scale-free and protects a retain loss the more the smaller it is: the released look-ahead's
        choice. None is False: a logarithm has no floor, so that a loss which can be fitted to zero
        pulls without end (1 / U grows), and a loss <= 0 (gradient ascent) has every step skipped.
      normalize_weights: divide the weights by 1 + sum(lambda), so that a large multiplier does not
        lengthen the step. None is True; undivided, a growing multiplier ended a run at learning rate
        0.01 that was stable divided.
      budget: how much each retain loss may rise over the whole run, > 0, in the loss's units (nats of
        a cross-entropy; for a relative one 0.05 * R_0): a float, or an array [K]. It takes the
        place of tolerance and dual_optimizer, works on raw losses with normalised weights, and
        observes as "lagged" does, since a look-ahead sees the batch that was just fitted. It aims at
        95% of the budget, which leaves room for what batches cannot tell. Where the learning rate alone
        keeps the retain loss above the budget, ``surgery_info(state).infeasible`` says so. Draw retain
        batches independently: in reshuffled passes a batch holds what was not trained on for longest,
        its loss lies above the whole set's, and less than the budget is spent.
        The multiplier moves between e^-5 (a tenth of it when all is forgotten) and e^8 times
        initial_multiplier: scale that by U / R.
      retain_baseline: R_0, the mean retain loss before unlearning, a float or [K]. None: the mean of
        the first 10 batches, during which the parameters stay where they are (updates are zero).
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
      everything else kept and ``surgery_info(state).skipped_steps`` incremented. An inner optimiser
      that overflows by itself is seen by the look-ahead only.

      ``optax.MultiSteps`` around this sees the last mini-batch only: for a batch that is too large
      use `accumulated`. ``optax.apply_if_finite`` and other wrappers that inspect ``updates`` need a pytree
      of zeros in place of None; ``optax.inject_hyperparams`` needs ``static_args=("losses_fn",)``.
      Wrappers that refuse extra arguments (``optax.lookahead``, ``optax.contrib.sam``,
      ``optax.contrib.split_real_and_imaginary``, a line search behind this) raise: use them as inner
      where they take the direction alone, or not at all.

    Raises:
      TypeError: losses_fn is no function or returns something else than Losses; batch or params is
        missing, or state is another transformation's; a leaf of params is not floating; inner or
        dual_optimizer is no transformation.
      ValueError: an unknown measure; "lookahead" without inner; a multiplier that is negative, not
        finite or not of the retain loss's shape; a tolerance of another shape or not finite; a
        forget loss that is no scalar; a retain loss of rank > 1; updates unlike params. A budget <= 0,
        not finite or of another shape, or with a tolerance, a dual_optimizer, "directional",
        log_losses, undivided weights or an initial multiplier of 0; a baseline without a budget. Losses
        that differ between the devices of a shard_map while params do not, or may (``check_vma=False``,
        pmap), without axis_name.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> def losses_fn(x, batch):
      ...     return eu.Losses(jnp.sum((x - batch["forget"]) ** 2), jnp.sum((x - batch["retain"]) ** 2))
      >>> batch = {"forget": jnp.array([2.0, 1.0]), "retain": jnp.array([0.0, -1.0])}
      >>> tx = eu.eupmu(losses_fn, optax.sgd(0.05))
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
      (3.11, 1.13)

      With a budget of 0.5 over the whole run:

      >>> tx = eu.eupmu(losses_fn, optax.sgd(0.05), budget=0.5, retain_baseline=1.0)
      >>> x = jnp.array([0.0, 0.0])
      >>> state = tx.init(x)
      >>> for _ in range(300):
      ...     x, state = step(x, state, batch)
      >>> round(float(losses_fn(x, batch).retain), 3)
      1.475

    Source: EUPMU, arXiv 2510.22124 ("lookahead", and "lagged" as its fast variant in the released
    code); "directional", K utilities, budgets, and skipping are ours.
    """
    check_losses_fn(losses_fn)
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}; got {measure!r}")
    if budget is not None:
        if measure == "directional":
            raise ValueError(
                "budget does not go with measure='directional', which does not see what the steps add up to: "
                "leave measure out"
            )
        # A level needs a fresh batch: the one that was just stepped on looks better than the rest.
        measure = "lagged"
    if inner is None and measure == "lookahead":
        raise ValueError(
            "measure='lookahead' re-evaluates the retain loss after the inner optimiser's update: "
            "pass inner=, for instance optax.sgd(1e-2), or measure='lagged' or 'directional'"
        )
    if inner is None:
        inner = optax.identity()
    dual_lib.check_transformation(inner, "inner")
    optimizer = optax.with_extra_args_support(inner)
    dual = dual_lib.make_dual(
        tolerance, dual_optimizer, initial_multiplier, log_losses, normalize_weights, budget, retain_baseline
    )

    def init_fn(params):
        return EupmuState(dual_lib.init(dual), optimizer.init(params))

    def update_fn(updates: Any, state: Any, params: Any = None, *, batch: Any = None, **extra_args):
        check_update_args(updates, state, params, batch)
        at = linearize(losses_fn, params, batch, axis_name)
        check_utilities(at.losses, state.surgery.multiplier)

        ascended = state.surgery
        if measure == "lagged":
            ascended = dual_lib.ascend_lagged(dual, state.surgery, at.losses)
        direction = at.pull_back(
            weights(at.losses, ascended.multiplier, dual.log_losses, dual.normalize_weights)
        )
        if jax.tree.leaves(updates):
            direction = jax.tree.map(lambda d, u: d + u.astype(d.dtype), direction, updates)
        usable = is_usable(at.losses, dual.log_losses) & all_finite(direction)

        def eps():
            return dual_lib.tolerance_at(dual, state.surgery.applied_steps, at.losses.retain.dtype)

        def inner_update(direction, inner_state):
            updates, inner_state = optimizer.update(direction, inner_state, params, **extra_args)
            return optax.tree.cast_like(updates, params), inner_state

        def look_ahead(direction, inner_state):
            updates, _ = inner_update(direction, inner_state)
            ahead = retain_loss(losses_fn, optax.apply_updates(params, updates), batch, axis_name)
            violation = dual_lib.violation(at.losses.retain, ahead, eps(), dual.log_losses)
            valid = is_usable(Losses(at.losses.forget, ahead), dual.log_losses)
            return dual_lib.ascend(dual, state.surgery, violation), valid

        def no_look(direction, inner_state):
            del direction, inner_state
            return state.surgery, jnp.zeros_like(usable)

        step = (direction, state.inner_state)
        if measure == "lookahead":
            # Only scalars leave the look-ahead. Running inner again when the step is accepted costs
            # elementwise work; keeping its old and new state side by side would cost memory.
            ascended, usable = jax.lax.cond(usable, look_ahead, no_look, *step)
        elif measure == "directional":
            change = -at.push_forward(direction).retain
            relative = change / at.losses.retain if dual.log_losses else change
            ascended = dual_lib.ascend(dual, state.surgery, relative - eps())
        usable &= dual_lib.is_sound(ascended, before=state.surgery)

        moving = usable & ~dual_lib.is_measuring(ascended)
        new_updates, inner_state = commit(moving, inner_update, *step)
        surgery = dual_lib.select(usable, dual_lib.accept(ascended, at.losses), dual_lib.skip(state.surgery))
        return new_updates, EupmuState(surgery, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def commit(moving: jax.Array, inner_update: Any, direction: Any, inner_state: Any) -> tuple[Any, Any]:
    """inner_update(direction, inner_state) where `moving` holds, else updates of zero and the old state.

    A conditional of a TPU holds old and new state side by side: in all 1.4 x the memory of fine-tuning
    for 7B parameters on 16 chips, where a select takes 1.02 x. XLA does not fuse the select on a CPU (1.9 x
    for a small network with Adam), where the conditional takes 1.00 x.
    """

    def keep(direction, inner_state):
        return optax.tree.zeros_like(direction), inner_state

    def conditional(moving, *step):
        return jax.lax.cond(moving, inner_update, keep, *step)

    def selected(moving, *step):
        return dual_lib.select(moving, inner_update(*step), keep(*step))

    return jax.lax.platform_dependent(moving, direction, inner_state, cpu=conditional, default=selected)


def check_update_args(updates: Any, state: Any, params: Any, batch: Any) -> None:
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
            "eupmu in optax.masked or optax.partition wrap the inner optimiser, "
            "eupmu(losses_fn, inner=optax.masked(...))"
        )
    if not jax.tree.leaves(updates):
        return
    structure, shapes = jax.tree.structure(updates), list(map(jnp.shape, jax.tree.leaves(updates)))
    if structure != jax.tree.structure(params) or shapes != list(map(jnp.shape, jax.tree.leaves(params))):
        raise ValueError(
            "updates must be None or a pytree like params (it is added to the direction), got "
            f"{structure} with shapes {shapes} for params {jax.tree.structure(params)}"
        )
