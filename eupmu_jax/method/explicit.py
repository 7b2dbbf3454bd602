"""Exact unilateral gradient surgery: the closed form that implicit surgery approaches."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax.method import budget as budget_lib
from eupmu_jax.method import state as dual_lib
from eupmu_jax.method.gradient import all_finite, check_differentiable
from eupmu_jax.method.losses import accumulation_dtype, checked, is_usable
from eupmu_jax.method.state import check_tolerance


def unilateral_projection(
    forget_grads: chex.ArrayTree, retain_grads: chex.ArrayTree, tolerance: chex.Numeric = 0.0
) -> tuple[chex.ArrayTree, jax.Array]:
    r"""The direction nearest to the forget gradient that lets no retain loss rise too fast.

    .. math::
      d = \arg\min_d \tfrac12 |d - g_f|^2 \;\text{ subject to }\; \langle g_{r,k}, d \rangle \ge
      -\epsilon_k \;\forall k, \qquad d = g_f + \textstyle\sum_k \lambda_k g_{r,k}

    For one utility lambda = max(0, -(<g_r, g_f> + eps) / |g_r|^2); for K the multipliers solve a
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
    check_tolerance(tolerance, utilities)
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
    slope = jnp.full([count], tolerance, dtype) / r_scale / f_scale
    for f_leaf, r_leaf in zip(f, r, strict=True):
        axes = tuple(range(1, r_leaf.ndim))
        slope += jnp.sum(r_leaf * f_leaf[None], axes)
        gram += jnp.sum(r_leaf[:, None] * r_leaf[None], tuple(axis + 1 for axis in axes))
    scaled = solve_dual(gram, slope)

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


def explicit_surgery(
    *,
    tolerance: chex.Numeric = 0.0,
    budget: chex.Numeric | None = None,
    retain_baseline: chex.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exact surgery as a transformation: two gradients in, their projection out.

    .. math:: d_t = g_f + \textstyle\sum_k \lambda_k g_{r,k} \quad\text{at } \theta_t,
       \text{ as in } \texttt{unilateral\_projection}

    With a tolerance it bounds the retain loss to first order and per step: momentum, curvature and batch
    noise after it are not seen, so over many steps the retain loss drifts upwards. A budget closes
    the loop: eupmu's controller follows the observed losses and sets

    .. math:: \epsilon_{t,k} = -x_{t,k} |g_f| |g_{r,k}|, \qquad
       d_t = \mathrm{projection}(\epsilon_t) / (1 + \textstyle\sum_k \lambda_k)

    from x = 0, plain exact surgery, between -1, where nothing constrains, and 8.

    Args:
      tolerance: as for `unilateral_projection`. For a schedule use
        ``optax.inject_hyperparams(explicit_surgery)(tolerance=schedule)``.
      budget, retain_baseline: as for `eupmu`; [K] for K utilities.

    Returns:
      A GradientTransformationExtraArgs with ``update(forget_grads, state, params, *, retain_grads)``,
      stateless, or with a budget ``update(forget_grads, state, params, *, retain_grads, losses)``,
      whose state `multiplier` and `surgery_info` read; updates in the dtypes of forget_grads. Where a
      gradient (or a loss, with a budget) is not finite the output is zero and the state is kept.

      Inside ``optax.masked`` or ``optax.partition``, retain_grads must be masked like the updates:
      pass ``mask_compatible_extra_args=True`` to them. Transformations before this one in a chain,
      a clipping for instance, change the forget gradient only.

    Raises:
      TypeError: tolerance is a schedule; retain_grads, or losses with a budget, is missing.
      ValueError: as for `unilateral_projection`; a budget that `eupmu` refuses, or of another shape
        than the retain loss.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses(x[0] + x[1], -x[0] ** 2)
      >>> tx = optax.chain(eu.explicit_surgery(), optax.sgd(0.1))
      >>> x = jnp.array([1.0, 1.0])
      >>> losses, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(x, ())
      >>> updates, state = tx.update(forget_grads, tx.init(x), x, retain_grads=retain_grads)
      >>> updates
      Array([-0. , -0.1], dtype=float32)

    Source: unilateral gradient surgery, arXiv 2510.22124; the budget is ours.
    """
    if callable(tolerance):
        raise TypeError(
            "explicit_surgery counts no steps: for a schedule use "
            "optax.inject_hyperparams(explicit_surgery)(tolerance=schedule)"
        )
    check_tolerance(tolerance, np.shape(tolerance)[:1] if budget is None else np.shape(budget))
    dtype = np.float64 if getattr(budget, "dtype", None) == np.float64 else np.float32
    ones = np.ones(np.shape(0.0 if budget is None else budget), dtype)
    dual = dual_lib.make_dual(
        0.0 if budget is None else tolerance, None, ones, None, None, budget, retain_baseline
    )

    def init_fn(params):
        return optax.init_empty_state(params) if budget is None else dual_lib.init(dual)

    def update_fn(updates, state, params=None, *, retain_grads=None, losses=None, **extra_args):
        del params, extra_args
        if retain_grads is None:
            raise TypeError(
                "explicit_surgery.update needs retain_grads=..., the gradient of the retain loss: "
                "losses, forget_grads, retain_grads = forget_and_retain_grads(losses_fn)(params, batch)"
            )
        finite = all_finite((updates, retain_grads))
        masked = lambda keep, tree: jax.tree.map(lambda d: jnp.where(keep, d, jnp.zeros_like(d)), tree)
        if budget is None:
            return masked(finite, unilateral_projection(updates, retain_grads, tolerance)[0]), state
        if losses is None:
            raise TypeError(
                "explicit_surgery.update with a budget needs losses=..., the Losses of the same batch"
            )
        losses = checked(losses, "losses must be")
        if losses.retain.shape != state.multiplier.shape:
            raise ValueError(
                f"budget must have the shape {losses.retain.shape} of the retain loss, "
                f"got {state.multiplier.shape}"
            )
        dtype = state.multiplier.dtype
        bound = jnp.asarray(budget, dtype)
        demand, controlled = budget_lib.control(
            state.dual_state, jax.tree.map(lambda loss: loss.astype(dtype), losses), bound, lowest=-1.0
        )
        norms = jax.vmap(optax.tree.norm) if losses.retain.ndim else optax.tree.norm
        usable = finite & is_usable(losses, log_losses=False)
        slack = -demand * optax.tree.norm(updates) * norms(retain_grads)
        slack = jnp.where(usable, slack, jnp.zeros_like(slack))
        direction, multiplier = unilateral_projection(updates, retain_grads, slack)
        total = 1 + jnp.sum(multiplier)
        direction = jax.tree.map(lambda d: (d / total).astype(d.dtype), direction)
        stepped = dual_lib.follow(state, controlled, bound)._replace(multiplier=multiplier.astype(dtype))
        stepped = dual_lib.accept(stepped, losses)
        usable &= dual_lib.is_sound(stepped, before=state)
        moving = usable & ~dual_lib.is_measuring(stepped)
        return masked(moving, direction), dual_lib.select(usable, stepped, dual_lib.skip(state))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def utilities_shape(forget_grads: Any, retain_grads: Any) -> tuple[int, ...]:
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
    leading = {shape[:1] for shape in retain_shapes}
    if [shape[1:] for shape in retain_shapes] != shapes or len(leading) != 1 or leading <= {(), (0,)}:
        raise ValueError(
            "each leaf of retain_grads must have the shape of its leaf of forget_grads, or that with "
            f"one leading axis of length K, got {retain_shapes} and {shapes}"
        )
    return leading.pop()


def largest(leaves: list[jax.Array], count: int, dtype) -> jax.Array:
    """The largest |entry| of each of `count` stacked gradients, [count]; 1 where all are 0."""
    biggest = jnp.zeros([count], dtype)
    for leaf in leaves:
        biggest = jnp.maximum(biggest, jnp.max(jnp.abs(leaf), tuple(range(1, leaf.ndim)), initial=0))
    return jnp.where(biggest == 0, jnp.ones_like(biggest), biggest)


def solve_dual(gram: jax.Array, slope: jax.Array) -> jax.Array:
    """argmin over lambda >= 0 of 1/2 lambda'G lambda + slope'lambda; G [K, K], slope [K].

    Always finite: 0 where g_k = 0, and the least-violation compromise where no direction satisfies
    all constraints.
    """
    diagonal = jnp.diagonal(gram)
    nonzero = diagonal > 0
    safe = jnp.where(nonzero, diagonal, jnp.ones_like(diagonal))
    if slope.size == 1:
        return jnp.where(nonzero, jnp.maximum(-slope / safe, 0), jnp.zeros_like(slope))
    # Unit gradients: utilities of very different scales then meet the same tolerances below.
    scale = jnp.where(nonzero, jax.lax.rsqrt(safe), jnp.zeros_like(safe))
    return scale * nonnegative_qp(gram * scale[:, None] * scale[None], slope * scale)


def nonnegative_qp(gram: jax.Array, slope: jax.Array) -> jax.Array:
    """argmin over x >= 0 of 1/2 x'Gx + slope'x for G >= 0 with unit or zero diagonal.

    Proximal-point iterations make the problem strictly convex where gradients are parallel; each is
    solved by the Lawson-Hanson active-set method.
    """
    eps = jnp.finfo(gram.dtype).eps
    ridge = 30 * eps
    identity = jnp.eye(slope.size, dtype=gram.dtype)
    regular = gram + ridge * identity

    def proximal_step(_, anchor):
        linear = slope - ridge * anchor

        def iteration(carry):
            x, passive, _, count = carry
            both = passive[:, None] & passive[None]
            target = jnp.linalg.solve(
                jnp.where(both, regular, identity), jnp.where(passive, -linear, jnp.zeros_like(linear))
            )
            blocking = passive & (target <= 0)
            blocked = jnp.any(blocking)
            reach = jnp.where(blocking, x / jnp.where(blocking, x - target, 1), jnp.inf)
            stepped = x + jnp.minimum(jnp.min(reach), 1) * (target - x)
            leaving = blocking & (reach <= jnp.min(reach))

            # What rounding alone can make of the gradient of a solved problem lets nothing enter.
            noise = 8 * eps * (jnp.abs(linear) + jnp.abs(regular) @ jnp.abs(target))
            gain = jnp.where(passive, -jnp.inf, -(regular @ target + linear) - noise)
            entering = (jnp.arange(slope.size) == jnp.argmax(gain)) & (gain > 0)
            return (
                jnp.where(blocked, jnp.where(leaving, 0, stepped), target),
                jnp.where(blocked, passive & ~leaving, passive | entering),
                ~blocked & ~jnp.any(entering),
                count + 1,
            )

        unfinished = lambda carry: ~carry[2] & (carry[3] < 10 * (slope.size + 1))
        nothing = (jnp.zeros_like(slope), jnp.zeros(slope.shape, bool))
        start = (*nothing, jnp.asarray(False), jnp.asarray(0, jnp.int32))
        return jnp.maximum(jax.lax.while_loop(unfinished, iteration, start)[0], 0)

    return jax.lax.fori_loop(0, 5, proximal_step, jnp.zeros_like(slope))
