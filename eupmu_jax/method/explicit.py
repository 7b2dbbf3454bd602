"""Exact surgery as a transformation: two gradients in, their projection out."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax.method import budget
from eupmu_jax.method.constraints import Budget, Constraint, Tolerance, check_constraint
from eupmu_jax.method.gradient import all_finite
from eupmu_jax.method.losses import accumulation_dtype, as_means, is_usable
from eupmu_jax.method.projection import unilateral_projection
from eupmu_jax.method.state import applied, initial_state, is_sound, select, skipped
from eupmu_jax.method.types import PyTree


def explicit_surgery(constraint: Constraint) -> optax.GradientTransformationExtraArgs:
    r"""Exact surgery as a transformation: two gradients in, their projection out.

    .. math:: d_t = g_f + \textstyle\sum_k \lambda_k g_{r,k} \quad\text{at } \theta_t,
       \text{ as in } \texttt{unilateral\_projection}

    A `Tolerance` bounds the retain loss to first order and per step: momentum, curvature and batch
    noise after it are not seen, so over many steps the retain loss drifts upwards. A `Budget` closes
    the loop: eupmu's controller follows the observed losses and sets

    .. math:: \epsilon_{t,k} = -x_{t,k} |g_f| |g_{r,k}|, \qquad
       d_t = \mathrm{projection}(\epsilon_t) / (1 + \textstyle\sum_k \lambda_k)

    from x = 0, plain exact surgery, between -1, where nothing constrains, and 8.

    Args:
      constraint: ``Tolerance(eps)``, of which nothing else may be set: eps is the one of
        `unilateral_projection`, per unit of step length along d; for a schedule use
        ``optax.inject_hyperparams(lambda eps: explicit_surgery(Tolerance(eps)))(eps=schedule)``. Or
        ``Budget(total)``; [K] numbers for K utilities.

    Returns:
      A GradientTransformationExtraArgs with ``update(forget_grads, state, params, *, retain_grads)``,
      stateless, or with a budget ``update(forget_grads, state, params, *, retain_grads, losses)``,
      whose state `multiplier` and `surgery_info` read; updates in the dtypes of forget_grads. Where a
      gradient (or a loss, with a budget) is not finite the output is zero and the state is kept.

      Inside ``optax.masked`` or ``optax.partition``, retain_grads must be masked like the updates:
      pass ``mask_compatible_extra_args=True`` to them. Transformations before this one in a chain,
      a clipping for instance, change the forget gradient only.

    Raises:
      TypeError: no constraint; a schedule; retain_grads, or losses with a budget, is missing.
      ValueError: more of a Tolerance than eps; what `unilateral_projection` raises; a budget of another shape
        than the retain loss.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses(x[0] + x[1], -x[0] ** 2)
      >>> tx = optax.chain(eu.explicit_surgery(eu.Tolerance(0.0)), optax.sgd(0.1))
      >>> x = jnp.array([1.0, 1.0])
      >>> losses, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(x, ())
      >>> updates, state = tx.update(forget_grads, tx.init(x), x, retain_grads=retain_grads)
      >>> updates
      Array([-0. , -0.1], dtype=float32)

    Source: unilateral gradient surgery, arXiv 2510.22124; the budget is ours.
    """
    check_constraint(constraint)
    return _with_budget(constraint) if isinstance(constraint, Budget) else _with_tolerance(constraint)


def _with_tolerance(constraint: Tolerance) -> optax.GradientTransformationExtraArgs:
    """The projection itself, step by step."""
    eps = constraint.eps
    if callable(eps):
        raise TypeError(
            "explicit_surgery counts no steps: for a schedule use optax.inject_hyperparams("
            "lambda eps: explicit_surgery(Tolerance(eps)))(eps=schedule)"
        )
    settings = [field for field in dataclasses.fields(constraint) if field.name != "eps"]
    if others := [field.name for field in settings if getattr(constraint, field.name) != field.default]:
        raise ValueError(
            f"explicit_surgery is exact and has no use for {', '.join(others)}: give Tolerance(eps) alone"
        )

    def update(updates, state, params=None, *, retain_grads=None, **extra_args):
        del params, extra_args
        _check_retain_grads(retain_grads)
        finite = all_finite((updates, retain_grads))
        return _masked(finite, unilateral_projection(updates, retain_grads, eps)[0]), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _with_budget(constraint: Budget) -> optax.GradientTransformationExtraArgs:
    """The projection whose tolerance the controller of a budget sets."""
    shape = np.shape(constraint.total)

    def init(params):
        # Scalars are not narrower than the sums that they are compared with.
        dtype = accumulation_dtype(*(leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")))
        return initial_state(jnp.ones(shape, dtype), partial(budget.init, baseline=constraint.baseline))

    def update(updates, state, params=None, *, retain_grads=None, losses=None, **extra_args):
        del params, extra_args
        _check_retain_grads(retain_grads)
        if losses is None:
            raise TypeError(
                "explicit_surgery.update with a budget needs losses=..., the Losses of the same batch"
            )
        losses = as_means(losses, "losses must be")
        if losses.retain.shape != shape:
            raise ValueError(
                f"budget total must have the shape {losses.retain.shape} of the retain loss, got {shape}"
            )
        dtype = state.multiplier.dtype
        total = jnp.asarray(constraint.total, dtype)
        seen = jax.tree.map(lambda loss: loss.astype(dtype), losses)
        demand, controlled = budget.control(state.controller_state, seen, total, lowest=-1.0)
        usable = all_finite((updates, retain_grads)) & is_usable(losses, log_losses=False)
        norm = lambda tree: optax.tree.norm(optax.tree.cast(tree, dtype))
        norms = jax.vmap(norm) if shape else norm
        slack = -demand * norm(updates) * norms(retain_grads)
        slack = jnp.where(usable, slack, jnp.zeros_like(slack))
        direction, multiplier = unilateral_projection(updates, retain_grads, slack)
        length = 1 + jnp.sum(multiplier)
        direction = jax.tree.map(lambda d: (d.astype(dtype) / length).astype(d.dtype), direction)
        stepped = budget.followed(state, controlled, total)._replace(multiplier=multiplier.astype(dtype))
        stepped = applied(stepped, losses)
        usable &= is_sound(stepped, before=state)
        moving = usable & ~budget.is_measuring(controlled)
        return _masked(moving, direction), select(usable, stepped, skipped(state))

    return optax.GradientTransformationExtraArgs(init, update)


def _masked(keep: jax.Array, tree: PyTree) -> PyTree:
    """`tree` where `keep` holds, else zeros."""
    return jax.tree.map(lambda leaf: jnp.where(keep, leaf, jnp.zeros_like(leaf)), tree)


def _check_retain_grads(retain_grads: PyTree) -> None:
    if retain_grads is None:
        raise TypeError(
            "explicit_surgery.update needs retain_grads=..., the gradient of the retain loss: "
            "losses, forget_grads, retain_grads = forget_and_retain_grads(losses_fn)(params, batch)"
        )
