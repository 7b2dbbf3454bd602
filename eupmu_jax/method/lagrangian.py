"""The Lagrangian as an ordinary loss: the weights are a parameter, and its gradient is the losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax.method.constraints import Constraint, Tolerance, check_constraint, check_transformation
from eupmu_jax.method.controller import Controller, make_controller
from eupmu_jax.method.eupmu import committed
from eupmu_jax.method.implicit import implicit_surgery
from eupmu_jax.method.losses import Losses, LossesFn, accumulation_dtype, as_means, check_losses_fn
from eupmu_jax.method.state import SurgeryState, surgery_state
from eupmu_jax.method.types import Numbers, PyTree


class Weighted(NamedTuple):
    r"""Parameters and the weights of the losses: the pytree that a trainer trains in place of the parameters.

    Attributes:
      params: theta, a pytree of arrays.
      weights: w, [1 + K], of the forget loss and of the K retain losses (K = 1 for a scalar one), float32 or
        float64 whatever params is.

    Example:
      >>> import jax.numpy as jnp
      >>> import eupmu_jax as eu
      >>> eu.Weighted({"w": jnp.zeros(2)}, jnp.array([0.5, 0.5])).weights
      Array([0.5, 0.5], dtype=float32)

    Source: the multiplier as a parameter is Platt and Barr's differential multiplier method (1987).
    """

    params: Any
    weights: Any


class SaddlePointState(NamedTuple):
    """The multiplier's state and the inner optimiser's."""

    surgery: SurgeryState
    inner_state: PyTree


def weighted(params: PyTree, constraint: Constraint, *, initial_multiplier: Numbers = 1.0) -> Weighted:
    r"""The parameters with the weights of the first step: what `saddle_point` trains.

    .. math:: w_0 = (1, \lambda_0) \;/\; (1 + \textstyle\sum_k \lambda_{0,k})

    Args:
      params: pytree of arrays; they are not copied.
      constraint: that of `saddle_point`.
      initial_multiplier: that of `saddle_point`, lambda_0, a scalar, or [K] for K utilities.

    Returns:
      `Weighted`, whose weights are float64 where initial_multiplier or a leaf of params is, else float32.

    Raises:
      TypeError, ValueError: as `saddle_point` for the constraint and the multiplier.

    Example:
      >>> import jax.numpy as jnp
      >>> import eupmu_jax as eu
      >>> eu.weighted(jnp.zeros(2), eu.Budget(0.1), initial_multiplier=jnp.array([1.0, 2.0])).weights
      Array([0.25, 0.25, 0.5 ], dtype=float32)
    """
    controller = lagged_controller(constraint, initial_multiplier)
    state = controller.init()
    arrays = (leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype"))
    return Weighted(params, weights_of(controller, state, accumulation_dtype(state.multiplier, *arrays)))


def lagrangian(losses_fn: LossesFn) -> Callable[[Weighted, PyTree], jax.Array]:
    r"""One scalar loss for any trainer: the weighted losses, whose gradients are all that the method needs.

    .. math::
      L(\theta, w) &= w_0\, U(\theta) + \textstyle\sum_k w_k R_k(\theta) \\
      \nabla_\theta L &= w_0 \nabla U + \textstyle\sum_k w_k \nabla R_k, \qquad
      \nabla_w L = (U, R_1, \dots, R_K)

    So a trainer that differentiates this and averages its gradients over micro-batches or devices averages
    the losses as well. What it does to its gradients must be linear and keep their scale: a mean. Clipping
    belongs into the ``inner`` of `saddle_point`, since clipping all gradients together clips the losses. For
    the same reason there is no loss scale, and no sum in place of a mean.

    Args:
      losses_fn: pure function (params, batch) -> `Losses`, the losses themselves and not their logarithms. A
        `Mean` counts as total / count, so that micro-batches and devices of unequal counts are averaged by
        their means: give all of them as many examples.

    Returns:
      A function (weighted, batch) -> [], float32 or wider: <w, losses> of a `Weighted`, in the losses' units.

    Raises:
      TypeError: losses_fn is no function, or returns no Losses; what it is called with is no Weighted.
      ValueError: weights that are not one for each loss.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses((x - 2.0) ** 2, (x - batch) ** 2)
      >>> loss_fn = eu.lagrangian(losses_fn)
      >>> jax.grad(loss_fn)(eu.Weighted(jnp.array(1.0), jnp.array([0.75, 0.25])), 0.0)
      Weighted(params=Array(-1., dtype=float32, weak_type=True), weights=Array([1., 1.], dtype=float32))

    Source: the scalarised objective of arXiv 2510.22124; the weights as a parameter are ours.
    """
    check_losses_fn(losses_fn)

    def loss_fn(weighted: Weighted, batch: PyTree) -> jax.Array:
        check_weighted(weighted, "the loss of lagrangian")
        losses = as_means(losses_fn(weighted.params, batch))
        values = jnp.concatenate([losses.forget[None], jnp.atleast_1d(losses.retain)])
        if weighted.weights.shape != values.shape:
            raise ValueError(
                f"there are {len(values)} losses, the forget loss first, but weights of shape "
                f"{weighted.weights.shape}: give initial_multiplier the shape {losses.retain.shape} of the "
                "retain loss"
            )
        dtype = accumulation_dtype(values, weighted.weights)
        return jnp.sum(weighted.weights.astype(dtype) * values.astype(dtype))

    return loss_fn


def saddle_point(
    inner: optax.GradientTransformation, constraint: Constraint, *, initial_multiplier: Numbers = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""The optimiser of a `Weighted`: parameters go down the Lagrangian, weights follow the constraint.

    For trainers that take one loss and one optimiser, and hand no extra arguments to it. The gradient g_t of
    `lagrangian` with respect to the weights is the losses of the step:

    .. math::
      (U_t, R_t) &= g_{t,w} \quad\text{at } \theta_t \\
      \theta_{t+1} &= \theta_t + \mathrm{inner}(g_{t,\theta}) \\
      \lambda_{t+1} &= \text{the constraint's, from } \lambda_t \text{ and } (U_t, R_t) \\
      w_{t+1} &= (1, \lambda_{t+1}) \;/\; (1 + \textstyle\sum_k \lambda_{t+1,k})

    This equals ``optax.chain(implicit_surgery(constraint), inner)`` step for step: there, too, what is seen
    at theta_t weighs the gradient of step t + 1. The multiplier itself is in the state, and the update of the
    weights is its w_{t+1} minus the weights that came in: what moved them is undone.

    Args:
      inner: the optimiser of the parameters: clipping, weight decay, masks and accumulated averages are put
        here, where they do not reach the weights.
      constraint: a `Budget`, or a `Tolerance` whose measure is "lagged" and whose losses are raw.
      initial_multiplier: as for `eupmu`, and the same as for `weighted`.

    Returns:
      A GradientTransformationExtraArgs. ``init(weighted)`` -> state, arrays only: inner's state and O(K)
      scalars, which `surgery_info` and `multiplier` read. ``update(grads, state, weighted)`` -> (updates,
      state), both `Weighted`; ``optax.apply_updates`` gives the next one. Gradients are taken in the dtypes
      of params, updates come in these; extra arguments go to inner. An integer leaf's float0 gradient is
      zero.

      A step whose losses or gradient are not finite changes nothing: updates of zero, everything else kept,
      and ``surgery_info(state).skipped_steps`` incremented. While a budget's baseline is measured, inner is
      given zeros, on which decoupled weight decay still decays.

      With ``optax.MultiSteps(saddle_point(...), n)`` a step is that of n equal micro-batches as one, up to
      the float32 in which it sums; its sum (``use_grad_mean=False``) would be n times the losses. A NaN stays
      in its sum unless it has ``should_skip_update_fn=optax.skip_not_finite``. In shard_map and pmap average
      the gradients as for any loss.

      What scales gradients in front of this (``optax.chain(clip, saddle_point(...))``, a trainer's own
      clipping, a loss scale) scales the losses, which nothing here can see: compare
      ``surgery_info(state).retain_loss`` with the retain loss that you know. What comes after it in a chain
      would move the weights. Wrappers that move the iterate (``optax.lookahead``,
      ``optax.contrib.schedule_free``) go into inner where they can, or not at all.

    Raises:
      TypeError: inner or constraint is something else; grads or params that are no Weighted; weights, or
        their gradient, that are masked or were cast to less than float32.
      ValueError: ``log_losses=True``, or a measure that looks at the step itself; a multiplier of another K
        than the weights or the constraint, or < 0.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses(jnp.sum((x - batch[0]) ** 2), jnp.sum((x - batch[1]) ** 2))
      >>> batch = jnp.array([[2.0, 1.0], [0.0, -1.0]])
      >>> budget = eu.Budget(0.5, baseline=1.0)
      >>> loss_fn, tx = eu.lagrangian(losses_fn), eu.saddle_point(optax.sgd(0.05), budget)
      >>> weighted = eu.weighted(jnp.zeros(2), budget)
      >>> state = tx.init(weighted)
      >>> @jax.jit
      ... def step(weighted, state, batch):  # nothing in here knows of unlearning
      ...     grads = jax.grad(loss_fn)(weighted, batch)
      ...     updates, state = tx.update(grads, state, weighted)
      ...     return optax.apply_updates(weighted, updates), state
      >>> for _ in range(300):
      ...     weighted, state = step(weighted, state, batch)
      >>> info = eu.surgery_info(state)  # the losses were 5 and 1 at the start
      >>> round(float(info.forget_loss), 2), round(float(info.retain_loss), 2)
      (2.57, 1.5)

    Source: the fast variant of EUPMU, arXiv 2510.22124; the weights as a parameter, and budgets, are ours.
    """
    check_transformation(inner, "inner")
    controller = lagged_controller(constraint, initial_multiplier)
    surgery = implicit_surgery(constraint, initial_multiplier=initial_multiplier)
    optimizer = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> SaddlePointState:
        # Optax's own tools call this with a placeholder for the parameters.
        trained = params.params if isinstance(params, Weighted) else params
        return SaddlePointState(controller.init(), optimizer.init(trained))

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[Weighted, SaddlePointState]:
        if not isinstance(state, SaddlePointState):
            raise TypeError(f"state must come from the init of saddle_point, got {type(state).__name__}")
        check_weighted(updates, "grads of saddle_point.update")
        check_weighted(params, "params of saddle_point.update")
        losses = as_losses(updates.weights, state.surgery)
        grads = jax.tree.map(gradient_like, updates.params, params.params)
        grads, after = surgery.update(grads, state.surgery, losses=losses)
        stepped = surgery_state(after)
        good = stepped.skipped_steps == state.surgery.skipped_steps

        def inner_update(grads, inner_state):
            moves, stepped = optimizer.update(grads, inner_state, params.params, **extra_args)
            # An integer leaf's moments start as integers, and Adam's come back as floats; they are zero.
            stepped = jax.tree.map(as_integer_where, stepped, inner_state)
            return optax.tree.cast_like(moves, params.params), stepped

        moves, inner_state = committed(good, inner_update, grads, state.inner_state)
        ahead = weights_of(controller, stepped, params.weights.dtype) - params.weights
        ahead = jnp.where(good, ahead, jnp.zeros_like(ahead))
        return Weighted(moves, ahead), SaddlePointState(stepped, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def lagged_controller(constraint: Constraint, initial_multiplier: Numbers) -> Controller:
    """The controller of a constraint that needs no more than the losses of each step; else a ValueError."""
    check_constraint(constraint)
    if isinstance(constraint, Tolerance) and constraint.log_losses:
        raise ValueError(
            "the gradient with respect to the weights is the losses, and the mean of logarithms is not the "
            "logarithm of a mean: leave log_losses out, or use implicit_surgery or eupmu"
        )
    if isinstance(constraint, Tolerance) and constraint.measure != "lagged":
        raise ValueError(
            f"saddle_point sees no more than gradients, and measure={constraint.measure!r} looks at the step "
            "itself: leave the measure out, or use eupmu"
        )
    return make_controller(constraint, initial_multiplier)


def weights_of(controller: Controller, state: SurgeryState, dtype: Any) -> jax.Array:
    """[1 + K]: of raw losses the weights depend on their number and dtype alone."""
    none = Losses(jnp.zeros([], dtype), jnp.zeros(state.multiplier.shape, dtype))
    forget, retain = controller.weights(state, none)
    return jnp.concatenate([forget[None], jnp.atleast_1d(retain)])


def as_losses(grads: jax.Array, surgery: SurgeryState) -> Losses:
    """The gradient with respect to the weights as what it is."""
    shape = surgery.multiplier.shape
    if grads.shape != (1 + surgery.multiplier.size,):
        raise ValueError(
            f"weights of shape {grads.shape} do not go with an initial_multiplier of shape {shape}: give "
            "weighted and saddle_point the same one, of the shape of the retain loss"
        )
    return Losses(grads[0], grads[1:].reshape(shape))


def as_integer_where(new: Any, old: Any) -> Any:
    was_integer = jnp.issubdtype(jnp.result_type(old), jnp.integer)
    return new.astype(old.dtype) if was_integer and new.dtype != old.dtype else new


def gradient_like(grad: Any, leaf: Any) -> jax.Array:
    return jnp.zeros_like(leaf) if grad.dtype == jax.dtypes.float0 else grad.astype(leaf.dtype)


def check_weighted(tree: PyTree, name: str) -> None:
    """TypeError unless it is a Weighted whose weights can hold losses."""
    if not isinstance(tree, Weighted):
        raise TypeError(
            f"{name} must be eupmu_jax.Weighted, got {type(tree).__name__}: train weighted(params, "
            "constraint) on lagrangian(losses_fn)"
        )
    dtype = getattr(tree.weights, "dtype", None)
    if dtype not in (np.float32, np.float64):
        raise TypeError(
            f"the weights of {name} must be float32 or float64, got {dtype or type(tree.weights).__name__}: "
            "cast and mask nothing but params, for the losses are the weights' gradient"
        )
