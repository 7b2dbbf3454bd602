"""One forward pass, and the gradients that are pulled back through it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from eupmu_jax.method.losses import (
    Losses,
    LossesFn,
    accumulation_dtype,
    check_losses_fn,
    totals_and_counts,
)
from eupmu_jax.method.types import PyTree

AxisName = str | Sequence[str] | None


class Linearization(NamedTuple):
    """The losses at one theta and their derivative there, the same on every device of the axis.

    Attributes:
      losses: (U, R), the means over the whole batch.
      aux: what else losses_fn returned, each device's own.
      pull_back: (cotangent, select) -> the gradient of <cotangent, select(losses)>, like params: a backward
        pass.
      push_forward: tangent, like params -> the change of the losses along it: a tangent forward pass.
    """

    losses: Losses
    aux: PyTree
    pull_back: Callable[..., PyTree]
    push_forward: Callable[[PyTree], Losses]


def linearize(
    losses_fn: Callable[[Any, Any], Any],
    params: PyTree,
    batch: PyTree,
    axis_name: AxisName = None,
    has_aux: bool = False,
) -> Linearization:
    r"""Evaluates the losses once and keeps their derivative.

    .. math:: L = \frac{\sum_d t_d(\theta)}{\sum_d n_d}, \qquad
       \nabla \langle c, L \rangle = \sum_d J_d^\top \frac{c}{\sum_d n_d}

    over the devices d of the axis, with totals t_d, counts n_d and J_d the Jacobian of t_d. The weights c may
    depend on the losses, for these are reduced before anything nonlinear is done to them.
    """
    check_differentiable(params)

    def local_totals(params):
        out = losses_fn(params, batch)
        if has_aux and (not isinstance(out, tuple) or isinstance(out, Losses) or len(out) != 2):
            raise TypeError(
                f"losses_fn with has_aux=True must return (Losses, aux), got {type(out).__name__}"
            )
        losses, aux = out if has_aux else (out, None)
        totals, counts = totals_and_counts(losses)
        check_reduced(totals, params, axis_name)
        return varying(totals, axis_name), (counts, aux)

    # Marked as each device's own copy: the transpose of using one copy on all devices is a sum over them, and
    # JAX would insert it in tracked code (check_vma) but not elsewhere. So no sum is inserted, and ours is
    # the only one.
    params = varying(params, axis_name)
    # One forward pass serves both directions: linearize keeps its residuals. jax.vjp could only pull back,
    # jax.jvp would need the direction before the gradient is there.
    totals, push, (counts, aux) = jax.linearize(local_totals, params, has_aux=True)
    marked = (*varying_axes(totals), *as_axes(axis_name))
    losses, counts = reduce(totals, counts, axis_name)

    def push_share(tangent):
        """What this device adds to the change of the means."""
        return jax.tree.map(jnp.divide, push(tangent), counts)

    def pull_back(cotangent, select=lambda losses: losses):
        # Transposing the share, not push itself, puts the division by the counts into the backward pass of
        # the one cotangent, and what `select` leaves out is never pulled back.
        pull = jax.linear_transpose(lambda tangent: select(push_share(tangent)), params)
        # The cotangent is the same on all devices, the function that it enters is not: tracking wants it
        # marked.
        return summed(pull(varying(cotangent, marked))[0], axis_name)

    def push_forward(tangent):
        return summed(push_share(varying(tangent, tuple(varying_axes(params)))), axis_name)

    return Linearization(losses, aux, pull_back, push_forward)


def reduce(totals: Losses, counts: Losses, axis_name: AxisName) -> tuple[Losses, Losses]:
    """The means over the whole axis, from one reduction, and the counts that they were divided by."""
    if axis_name is not None:
        parts, rebuild = ravel_pytree((totals, counts))
        totals, counts = rebuild(summed(varying(parts, axis_name), axis_name))
    return jax.tree.map(jnp.divide, totals, counts), counts


def retain_loss(losses_fn: LossesFn, params: PyTree, batch: PyTree, axis_name: AxisName = None) -> jax.Array:
    """R(params), shape [] or [K]."""
    return reduce(*totals_and_counts(losses_fn(params, batch)), axis_name)[0].retain


def forget_and_retain_grads(losses_fn: LossesFn, axis_name: AxisName = None):
    r"""The two gradients of exact surgery, g_f = grad U and g_r = grad R, from one forward pass.

    Each gradient is pulled back on its own, so a batch whose forget and retain examples are
    disjoint is back-propagated once in total; a shared forward pass is back-propagated 1 + K times.

    Args:
      losses_fn: pure function (params, batch) -> `Losses`.
      axis_name: as for `eupmu`; None outside shard_map and pmap.

    Returns:
      A function (params, batch) -> (losses, forget_grads, retain_grads). The gradients have the
      structure and dtypes of params; with K utilities each leaf of retain_grads has a leading
      axis of length K.

    Raises:
      TypeError: losses_fn returns something else than Losses, or a leaf of params is not floating.
      ValueError: a forget loss that is not a scalar, a retain loss of rank > 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses(jnp.sum(x), jnp.stack([jnp.sum(x**2), x[0]]))
      >>> losses, g_f, g_r = eu.forget_and_retain_grads(losses_fn)(jnp.array([1.0, 2.0]), ())
      >>> g_f
      Array([1., 1.], dtype=float32)
      >>> g_r
      Array([[2., 4.],
             [1., 0.]], dtype=float32)

    Source: the inputs of unilateral gradient surgery, arXiv 2510.22124.
    """

    check_losses_fn(losses_fn)

    def grads_fn(params, batch):
        at = linearize(losses_fn, params, batch, axis_name)
        one = jnp.ones([], at.losses.forget.dtype)
        forget_grads = at.pull_back(one, lambda losses: losses.forget)
        pull_retain = lambda cotangent: at.pull_back(cotangent, lambda losses: losses.retain)
        if at.losses.retain.ndim == 0:
            return at.losses, forget_grads, pull_retain(one)
        basis = jnp.eye(at.losses.retain.size, dtype=one.dtype)
        return at.losses, forget_grads, jax.vmap(pull_retain)(basis)

    return grads_fn


def check_differentiable(params: PyTree, name: str = "params") -> None:
    """TypeError for a leaf that is not real floating point."""
    if params is None:
        raise TypeError(f"{name} is missing")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {dtype}, but only real floating-point "
                "leaves can be differentiated. To freeze it, take it out of params: pass it in "
                "batch, or close over it in losses_fn (NNX: nnx.split(model, nnx.Param, ...))"
            )


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every leaf's sum is finite, and so every element; a bool [].

    Elements that add up to more than float32 holds count as not finite.
    """
    # XLA on a CPU would write a bool for every element before it reduces them: three times the time of a sum.
    leaves = jax.tree.leaves(tree)
    sums = [jnp.isfinite(jnp.sum(leaf, dtype=accumulation_dtype(leaf))) for leaf in leaves]
    return jnp.all(jnp.stack(sums)) if sums else jnp.asarray(True)


def check_reduced(totals: Losses, params: PyTree, axis_name: AxisName) -> None:
    """ValueError where the losses of one device would pass for those of all."""
    if axes := varying_axes(totals) - varying_axes(params):
        raise ValueError(
            f"the losses differ between the devices of the axis {', '.join(sorted(axes))} and params do "
            "not, so their gradient would be a sum over it: pass axis_name"
        )
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    # Without tracking (check_vma=False, pmap) nothing can be marked as differing between devices.
    if axis_name is None and manual and not varying_axes(varying(totals, manual)):
        raise ValueError(
            f"inside pmap, or shard_map with check_vma=False, over {', '.join(manual)} it cannot be seen "
            "whether the losses are those of all devices: pass axis_name, or axis_name=() if each device "
            "has a model of its own"
        )


def summed(tree: PyTree, axis_name: AxisName) -> PyTree:
    """The sum over the devices of the axis."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes of a surrounding shard_map along which a leaf is known to differ."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def as_axes(axis_name: AxisName) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(axes, Sequence) or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"axis_name must be a name, a sequence of names or None, got {axis_name!r}")
    return tuple(axes)


def varying(tree: PyTree, axis_name: AxisName) -> PyTree:
    """`tree` with every leaf marked as differing between the devices of the axis."""
    axes = as_axes(axis_name)

    def mark(leaf):
        missing = tuple(axis for axis in axes if axis not in varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    try:
        return jax.tree.map(mark, tree)
    except (NameError, ValueError) as error:
        raise ValueError(
            f"axis_name={axis_name!r} names no axis of a shard_map or pmap around this call; under "
            "jit on sharded arrays leave it None"
        ) from error
