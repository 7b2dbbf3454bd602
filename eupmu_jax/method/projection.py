"""Exact unilateral gradient surgery in closed form: what implicit surgery approaches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eupmu_jax.method.constraints import check_shape, plain_numbers
from eupmu_jax.method.gradient import all_finite, check_differentiable
from eupmu_jax.method.losses import accumulation_dtype
from eupmu_jax.method.trees import leading_length
from eupmu_jax.method.types import Numbers, PyTree


def unilateral_projection(
    forget_grads: PyTree, retain_grads: PyTree, tolerance: Numbers = 0.0
) -> tuple[PyTree, jax.Array]:
    r"""The direction nearest to the forget gradient that lets no retain loss rise too fast.

    .. math::
      d = \arg\min_d \tfrac12 |d - g_f|^2 \;\text{ subject to }\; \langle g_{r,k}, d \rangle \ge
      -\epsilon_k \;\forall k, \qquad d = g_f + \textstyle\sum_k \lambda_k g_{r,k}

    For one utility ``lambda = max(0, -(<g_r, g_f> + eps) / |g_r|^2)``; for K the multipliers solve a
    non-negative quadratic programme in the Gramian of the retain gradients.

    Args:
      forget_grads: g_f, a pytree of floating arrays.
      retain_grads: g_r, a pytree of the same shapes; or each leaf with a leading axis of length K.
      tolerance: eps, a float or an array [K]: the allowed increase of each retain loss per unit of
        step length along d (theta moves by -alpha d, R by at most alpha eps to first order).
        Negative demands a decrease.

    Returns:
      (direction, multiplier): direction like forget_grads, in its dtypes; multiplier [] or [K], >= 0,
      float32 or wider as all sums are. Finite for finite gradients: where g_r = 0, or where it is so
      small that lambda overflows, lambda is 0 and d = g_f; where no direction keeps all tolerances
      the violation is about the least possible. With K >= 2 the Gramian limits the accuracy: float32
      resolves no two retain gradients that are (anti)parallel to within about 1e-3.

    Raises:
      TypeError: tolerance is a schedule; a leaf is not real floating point.
      ValueError: retain_grads fits forget_grads in neither way; a tolerance of another shape, or
        not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import eupmu_jax as eu
      >>> eu.unilateral_projection(jnp.array([1.0, 1.0]), jnp.array([-2.0, 0.0]))
      (Array([0., 1.], dtype=float32), Array(0.5, dtype=float32))

    Source: unilateral gradient surgery, arXiv 2510.22124; K utilities are ours.
    """
    if callable(tolerance):
        raise TypeError("tolerance must be a number or an array here: a projection counts no steps")
    check_differentiable(forget_grads, "forget_grads")
    check_differentiable(retain_grads, "retain_grads")
    utilities = utilities_shape(forget_grads, retain_grads)
    plain_numbers(tolerance, "tolerance")
    check_shape(tolerance, utilities, "tolerance")
    count = utilities[0] if utilities else 1
    given, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, forget_grads))
    retain_leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(retain_grads)]
    dtype = accumulation_dtype(*given, *retain_leaves)
    f = [leaf.astype(dtype) for leaf in given]
    r = [leaf.astype(dtype).reshape((count, *x.shape)) for leaf, x in zip(retain_leaves, f, strict=True)]

    # Squares of gradients of 1e20 or 1e-20 would leave float32: take out the largest entries first.
    f_scale, r_scale = largest([leaf[None] for leaf in f], 1, dtype)[0], largest(r, count, dtype)
    f = [leaf / f_scale for leaf in f]
    r = [leaf / r_scale.reshape((count,) + (1,) * (leaf.ndim - 1)) for leaf in r]
    gram = jnp.zeros([count, count], dtype)
    # XLA would divide by the product of the scales, which may underflow.
    by_retain = jax.lax.optimization_barrier(jnp.full([count], jnp.asarray(tolerance), dtype) / r_scale)
    slope = by_retain / f_scale
    for f_leaf, r_leaf in zip(f, r, strict=True):
        axes = tuple(range(1, r_leaf.ndim))
        slope += jnp.sum(r_leaf * f_leaf[None], axes)
        gram += jnp.sum(r_leaf[:, None] * r_leaf[None], tuple(axis + 1 for axis in axes))
    # What no multiplier can do for one utility must not take the others' away.
    alone = slope / jnp.diagonal(gram) * (f_scale / r_scale)
    scaled = solve_dual(gram, jnp.where(jnp.isfinite(alone), slope, jnp.inf))

    multiplier = scaled * (f_scale / r_scale)
    direction = [
        f_scale * (f_leaf + jnp.sum(scaled.reshape((count,) + (1,) * f_leaf.ndim) * r_leaf, 0))
        for f_leaf, r_leaf in zip(f, r, strict=True)
    ]
    direction = [d.astype(leaf.dtype) for d, leaf in zip(direction, given, strict=True)]
    # Without any multiplier the answer is g_f to the bit. What was not finite stays so.
    resolved = all_finite(direction) & all_finite(multiplier) & jnp.any(multiplier > 0)
    resolved |= ~(jnp.isfinite(f_scale) & jnp.all(jnp.isfinite(r_scale)))
    direction = [jnp.where(resolved, d, leaf) for d, leaf in zip(direction, given, strict=True)]
    multiplier = jnp.where(resolved, multiplier, jnp.zeros_like(multiplier))
    return jax.tree.unflatten(structure, direction), multiplier.reshape(utilities)


def utilities_shape(forget_grads: PyTree, retain_grads: PyTree) -> tuple[int, ...]:
    """() where retain_grads is shaped like forget_grads, (K,) where each leaf has a leading K axis."""
    if jax.tree.structure(forget_grads) != jax.tree.structure(retain_grads):
        raise ValueError(
            f"retain_grads must be a pytree like forget_grads, got {jax.tree.structure(retain_grads)} "
            f"and {jax.tree.structure(forget_grads)}"
        )
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(forget_grads)]
    retain_shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(retain_grads)]
    if retain_shapes == shapes:
        return ()
    count = leading_length(retain_grads)
    if [shape[1:] for shape in retain_shapes] != shapes or count is None:
        raise ValueError(
            "each leaf of retain_grads must have the shape of its leaf of forget_grads, or that with "
            f"one leading axis of length K, got {retain_shapes} and {shapes}"
        )
    return (count,)


def largest(leaves: list[jax.Array], count: int, dtype) -> jax.Array:
    """The largest |entry| of each of `count` stacked gradients, [count]; 1 where all are 0."""
    biggest = jnp.zeros([count], dtype)
    for leaf in leaves:
        biggest = jnp.maximum(biggest, jnp.max(jnp.abs(leaf), tuple(range(1, leaf.ndim)), initial=0))
    return jnp.where(biggest == 0, jnp.ones_like(biggest), biggest)


def solve_dual(gram: jax.Array, slope: jax.Array) -> jax.Array:
    """argmin over lambda >= 0 of 1/2 lambda'G lambda + slope'lambda; G [K, K], slope [K].

    Always finite: 0 where g_k = 0 or its slope overflows, and the least-violation compromise where no
    direction satisfies all constraints.
    """
    diagonal = jnp.diagonal(gram)
    nonzero = (diagonal > 0) & jnp.isfinite(slope)
    slope = jnp.where(nonzero, slope, jnp.zeros_like(slope))
    safe = jnp.where(nonzero, diagonal, jnp.ones_like(diagonal))
    if slope.size == 1:
        return jnp.where(nonzero, jnp.maximum(-slope / safe, 0), jnp.zeros_like(slope))
    # Unit gradients: utilities of very different scales then meet the same tolerances below.
    scale = jnp.where(nonzero, jax.lax.rsqrt(safe), jnp.zeros_like(safe))
    return scale * nonnegative_qp(gram * scale[:, None] * scale[None], slope * scale)


class ActiveSet(NamedTuple):
    """Where the active-set method is: a feasible x [K], which of its entries are free, and how far it got."""

    x: jax.Array
    passive: jax.Array
    solved: jax.Array
    iterations: jax.Array


def nonnegative_qp(gram: jax.Array, slope: jax.Array) -> jax.Array:
    """argmin over x >= 0 of 1/2 x'Gx + slope'x for G >= 0 with unit or zero diagonal.

    Parallel gradients make G singular, and then the free entries have no unique minimum: proximal-point
    iterations add a ridge around the last solution, which makes each problem strictly convex and vanishes
    from the answer as they converge. Each problem is solved by the active-set method of Lawson and Hanson
    (Solving Least Squares Problems, 1974, chapter 23).
    """
    eps = jnp.finfo(gram.dtype).eps
    # Above what rounding does to a Gramian of unit vectors, far below what it can resolve.
    ridge = 30 * eps
    identity = jnp.eye(slope.size, dtype=gram.dtype)
    regular = gram + ridge * identity

    def proximal_step(_, anchor):
        linear = slope - ridge * anchor

        def iteration(at: ActiveSet) -> ActiveSet:
            # The free ("passive") entries' minimum, with all others fixed at 0.
            both = at.passive[:, None] & at.passive[None]
            target = jnp.linalg.solve(
                jnp.where(both, regular, identity), jnp.where(at.passive, -linear, jnp.zeros_like(linear))
            )
            # Where that leaves x >= 0, go towards it until the first entry is 0, and fix that one.
            blocking = at.passive & (target <= 0)
            blocked = jnp.any(blocking)
            reach = jnp.where(blocking, at.x / jnp.where(blocking, at.x - target, 1), jnp.inf)
            stepped = at.x + jnp.minimum(jnp.min(reach), 1) * (target - at.x)
            leaving = blocking & (reach <= jnp.min(reach))

            # Where it does not, free the fixed entry along which the objective falls fastest. What rounding
            # alone can make of the gradient of a solved problem frees nothing: it would leave and enter for
            # ever.
            noise = 8 * eps * (jnp.abs(linear) + jnp.abs(regular) @ jnp.abs(target))
            gain = jnp.where(at.passive, -jnp.inf, -(regular @ target + linear) - noise)
            entering = (jnp.arange(slope.size) == jnp.argmax(gain)) & (gain > 0)
            return ActiveSet(
                x=jnp.where(blocked, jnp.where(leaving, 0, stepped), target),
                passive=jnp.where(blocked, at.passive & ~leaving, at.passive | entering),
                solved=~blocked & ~jnp.any(entering),
                iterations=at.iterations + 1,
            )

        # In exact arithmetic it ends after finitely many sets; the bound is for what rounding may do.
        unfinished = lambda at: ~at.solved & (at.iterations < 10 * (slope.size + 1))
        # All of slope, so that in shard_map they differ between devices where it does.
        none = jnp.zeros_like(slope, bool)
        start = ActiveSet(
            x=jnp.zeros_like(slope),
            passive=none,
            solved=jnp.any(none),
            iterations=jnp.sum(none, dtype=jnp.int32),
        )
        return jnp.maximum(jax.lax.while_loop(unfinished, iteration, start).x, 0)

    return jax.lax.fori_loop(0, 5, proximal_step, jnp.zeros_like(slope))
