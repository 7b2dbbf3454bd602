"""Implicit gradient surgery as a chainable transformation: weighted gradient in, dual step inside."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eupmu_jax.method.constraints import Constraint
from eupmu_jax.method.controller import make_controller
from eupmu_jax.method.gradient import AxisName, all_finite, linearize
from eupmu_jax.method.losses import LossesFn, as_means, check_losses_fn, check_utilities
from eupmu_jax.method.state import SurgeryState, applied, is_sound, select, skipped, surgery_state
from eupmu_jax.method.types import Numbers


class ImplicitSurgery(optax.GradientTransformationExtraArgs):
    """A GradientTransformationExtraArgs that also has ``value_and_grad``; see `implicit_surgery`."""

    value_and_grad: Callable[..., Callable[..., Any]]

    def __new__(cls, init, update, value_and_grad):
        self = super().__new__(cls, init, update)
        self.value_and_grad = value_and_grad
        return self

    def __getnewargs__(self):
        return (*self, self.value_and_grad)


def implicit_surgery(constraint: Constraint, *, initial_multiplier: Numbers = 1.0) -> ImplicitSurgery:
    r"""Implicit gradient surgery as the first link of a chain, for people who own their loop.

    The gradient is computed outside, with the multiplier read from the state, and the dual step is
    taken inside ``update`` from the losses that came with the gradient:

    .. math::
      g_t &= \text{weighted gradient at } \theta_t \text{ under } \lambda_t
             \quad\text{(value\_and\_grad)} \\
      v_t &= r_t(\theta_t) - r_{t-1}(\theta_{t-1}) - \epsilon_{t-1} \\
      \lambda_{t+1} &= \max(0, \mathrm{dual}(\lambda_t, -v_t)) \quad\text{(update; none at } t = 0)

    with r = R (log R where the tolerance has ``log_losses=True``). So the dual step lands one step later than
    in `eupmu` with "lagged": what is seen at theta_t weighs the gradient of step t + 1. With a `Budget`
    likewise.

    Args:
      constraint: a `Budget`, or a `Tolerance` whose measure is "lagged". While a budget's baseline is
        measured the gradients that come out are zero; links after this one run on them, and
        decoupled weight decay still decays.
      initial_multiplier: as for `eupmu`.

    Returns:
      A GradientTransformationExtraArgs that passes the gradient on unchanged, with
      ``update(grads, state, params, *, losses)`` and with

      ``value_and_grad(losses_fn, has_aux=False, axis_name=None)``, a function (params, batch, state)
      -> (losses, grads), or -> ((losses, aux), grads) where losses_fn returns (Losses, aux).
      ``state`` is this transformation's, or that of anything wrapped around it; ``axis_name`` is as
      for `eupmu` (losses and grads are averaged over it, aux is not: do that in losses_fn). The
      losses come back in float32 or wider, grads in the dtypes of params. Both parts depend on the
      constraint, so take them from one object (the object returned by
      ``optax.inject_hyperparams`` has no value_and_grad: keep a plain one beside it).

      Where a loss or gradient is not finite (or a loss <= 0 where its logarithm is needed) the
      output is zero, the state is kept and ``surgery_info(state).skipped_steps`` is incremented.
      Links after this one still run on the zeros: momentum keeps moving the parameters and Adam
      decays its moments. ``eupmu(losses_fn, inner)`` skips those too.

      ``optax.MultiSteps`` averages gradients but not losses, so around this it pairs the last
      mini-batch's losses with the mean gradient: `accumulated` computes both of the whole batch, and
      `saddle_point` is right inside MultiSteps.

    Raises:
      TypeError: no constraint; losses is missing or no Losses; a leaf of params is not floating.
      ValueError: a measure that looks at the step itself, which is not taken here; losses whose retain part
        has not the shape of the multiplier; a state with no surgery in it, or with several.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses((x - 2.0) ** 2, (x - batch) ** 2)
      >>> surgery = eu.implicit_surgery(eu.Tolerance(0.01))
      >>> tx = optax.chain(surgery, optax.clip_by_global_norm(1.0), optax.sgd(1e-2))
      >>> x = jnp.array(1.0)
      >>> state = tx.init(x)
      >>> @jax.jit
      ... def step(x, state, batch):
      ...     losses, grads = surgery.value_and_grad(losses_fn)(x, batch, state)
      ...     updates, state = tx.update(grads, state, x, losses=losses)
      ...     return optax.apply_updates(x, updates), state
      >>> x, state = step(x, state, jnp.array(0.0))
      >>> eu.multiplier(state)
      Array(1., dtype=float32)

    Source: the fast variant of EUPMU, arXiv 2510.22124, cut in two; the order of the dual step is
    ours.
    """

    controller = make_controller(constraint, initial_multiplier)
    if controller.observes != "nothing":
        raise ValueError(
            f"implicit_surgery does not see the step that is taken, which measure={controller.observes!r} "
            "looks at: leave the measure out, or use eupmu"
        )

    def init_fn(params):
        del params
        return controller.init()

    def update_fn(updates, state, params=None, *, losses=None, **extra_args):
        del params, extra_args
        if losses is None:
            raise TypeError(
                "implicit_surgery.update needs losses=..., the Losses that surgery.value_and_grad returned"
            )
        if not isinstance(state, SurgeryState):
            raise TypeError(f"state must come from implicit_surgery.init, got {type(state).__name__}")
        losses = as_means(losses, "losses must be")
        check_utilities(losses, state.multiplier)
        stepped = applied(controller.before(state, losses), losses)
        usable = controller.usable(losses) & all_finite(updates) & is_sound(stepped, before=state)
        moving = usable & ~controller.holds(stepped)
        updates = jax.tree.map(lambda u: jnp.where(moving, u, jnp.zeros_like(u)), updates)
        return updates, select(usable, stepped, skipped(state))

    def value_and_grad(losses_fn: LossesFn, has_aux: bool = False, axis_name: AxisName = None):
        check_losses_fn(losses_fn)

        def value_and_grad_fn(params, batch, state):
            surgery = surgery_state(state)
            at = linearize(losses_fn, params, batch, axis_name, has_aux)
            check_utilities(at.losses, surgery.multiplier)
            grads = at.pull_back(controller.weights(surgery, at.losses))
            return ((at.losses, at.aux) if has_aux else at.losses), grads

        return value_and_grad_fn

    return ImplicitSurgery(init_fn, update_fn, value_and_grad)
