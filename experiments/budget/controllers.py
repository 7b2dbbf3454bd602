"""What else could steer the multiplier towards a budget: the alternatives that the study compares."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from eupmu_jax.method import budget as pid
from eupmu_jax.method.controller import Controller, by_multiplier, make_controller
from eupmu_jax.method.eupmu import controlled
from eupmu_jax.method.losses import is_usable
from eupmu_jax.method.state import SurgeryState, initial_state
from experiments.shared.methods.eupmu import eupmu, eupmu_budget, method_of
from experiments.shared.methods.exact_surgery import exact_surgery_budget
from experiments.shared.methods.method import BatchLosses, LossFunctions, Method, Params, forget_and_retain

Number = jax.Array | float
MakeController = Callable[[Number, Number], Controller]
"""(budget, baseline) -> Controller."""


def steered(
    make: MakeController,
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    budget: Number,
    baseline: Number,
) -> Method:
    """The package's method under another controller."""
    return method_of(controlled(forget_and_retain(losses), optimizer, make(budget, baseline)))


def from_spending(
    init: Any, update: Callable[[Any, jax.Array], tuple[jax.Array, Any]], budget: Number, baseline: Number
) -> Controller:
    """The controller whose multiplier follows the share of the budget that a batch says is spent.

    `init` is what it remembers at first, update(memory, spent) -> (multiplier, memory).
    """

    def before(state: SurgeryState, losses: eu.Losses) -> SurgeryState:
        multiplier, memory = update(state.controller_state, (losses.retain - baseline) / budget)
        violation = losses.retain - baseline - budget
        return state._replace(multiplier=multiplier, controller_state=memory, violation=violation)

    def after(state: SurgeryState, losses: eu.Losses, observed: jax.Array) -> SurgeryState:
        raise NotImplementedError("nothing is observed after a step")

    return Controller(
        init=lambda: initial_state(1.0, lambda multiplier: init),
        before=before,
        after=after,
        weights=partial(by_multiplier, log_losses=False, normalize_weights=True),
        usable=partial(is_usable, log_losses=False),
        holds=lambda state: jnp.asarray(False),
        observes="nothing",
    )


def dual_ascent(optimizer: optax.GradientTransformation) -> MakeController:
    """lambda <- max(0, lambda + optimiser's step along y - 1), lambda_0 = 1, y the share spent."""

    def update(memory, y):
        multiplier, inner = memory
        updates, inner = optimizer.update(1 - y, inner, multiplier)
        multiplier = jnp.maximum(0.0, multiplier + updates)
        return multiplier, (multiplier, inner)

    return partial(from_spending, (jnp.ones([]), optimizer.init(jnp.ones([]))), update)


def proportional_integral(budget: Number, baseline: Number) -> Controller:
    """lambda = max(0, 1 + smoothed error + 0.03 sum of errors), as nuPI, arXiv 2406.04558."""

    def update(memory, y):
        smoothed, total = memory
        smoothed = 0.9 * smoothed + 0.1 * (y - 1)
        # The sum stops where the multiplier is 0: else it would have to climb back.
        total = jnp.maximum(total + 0.03 * (y - 1), -1 - smoothed)
        return jnp.maximum(0.0, 1 + smoothed + total), (smoothed, total)

    return from_spending((jnp.zeros([]), jnp.zeros([])), update, budget, baseline)


def secant(budget: Number, baseline: Number) -> Controller:
    """Dual ascent whose step is a tenth of the error over |dy / d lambda|, a secant of what was observed."""

    def update(memory, y):
        multiplier, change, slope, smoothed = memory
        smoothed_now = 0.8 * smoothed + 0.2 * y
        moved = jnp.abs(change) > 1e-6
        observed = jnp.abs(smoothed_now - smoothed) / jnp.where(moved, jnp.abs(change), 1.0)
        slope = jnp.where(moved, 0.95 * slope + 0.05 * observed, slope)
        change = jnp.clip(0.1 * (smoothed_now - 1) / jnp.maximum(slope, 1e-3), -1.0, 1.0)
        new = jnp.maximum(0.0, multiplier + change)
        return new, (new, new - multiplier, slope, smoothed_now)

    start = (jnp.ones([]), jnp.zeros([]), jnp.ones([]), jnp.zeros([]))
    return from_spending(start, update, budget, baseline)


def barrier(budget: Number, baseline: Number) -> Controller:
    """Adam on the violation of one step, whose tolerance is a twentieth of what is left of the budget."""
    optimizer = optax.adam(0.05)

    def update(memory, y):
        multiplier, inner, last, smoothed = memory
        smoothed = 0.8 * smoothed + 0.2 * y
        updates, inner = optimizer.update(-(y - last - 0.05 * (1 - smoothed)), inner, multiplier)
        multiplier = jnp.maximum(0.0, multiplier + updates)
        return multiplier, (multiplier, inner, y, smoothed)

    start = (jnp.ones([]), optimizer.init(jnp.ones([])), jnp.zeros([]), jnp.zeros([]))
    return from_spending(start, update, budget, baseline)


def multiplicative(budget: Number, baseline: Number) -> Controller:
    """log lambda <- log lambda + 0.1 (smoothed y - 1)."""

    def update(memory, y):
        exponent, smoothed = memory
        smoothed = 0.8 * smoothed + 0.2 * y
        exponent = jnp.clip(exponent + 0.1 * jnp.clip(smoothed - 1, -1, 4), pid.LOWEST, pid.HIGHEST)
        return jnp.exp(exponent), (exponent, smoothed)

    return from_spending((jnp.zeros([]), jnp.zeros([])), update, budget, baseline)


def fixed_gains(budget: Number, baseline: Number) -> Controller:
    """The package's controller with the same gains however noisy the observations, aimed at the budget."""

    def update(memory, y):
        smoothed, total = memory
        before, smoothed = smoothed, 0.8 * smoothed + 0.2 * y
        total = jnp.clip(total + 0.1 * (smoothed - 1), -3, 6)
        exponent = 3 * (smoothed - 1) + total + 10 * (smoothed - before)
        return jnp.exp(jnp.clip(exponent, -8, 8)), (smoothed, total)

    return from_spending((jnp.zeros([]), jnp.zeros([])), update, budget, baseline)


class Ahead(NamedTuple):
    """A controller's own memory, and the retain loss of the last batch after the step on it."""

    memory: Any
    seen: jax.Array


def looking_ahead(budget: Number, baseline: Number) -> Controller:
    """The package's controller, shown the retain loss of the last batch after the step on it."""
    packaged = make_controller(eu.Budget(budget, baseline=baseline), 1.0)
    alone = lambda state: state._replace(controller_state=state.controller_state.memory)

    def init() -> SurgeryState:
        state = packaged.init()
        seen = jnp.asarray(baseline, state.multiplier.dtype)
        return state._replace(controller_state=Ahead(state.controller_state, seen))

    def before(state: SurgeryState, losses: eu.Losses) -> SurgeryState:
        seen = state.controller_state.seen
        stepped = packaged.before(alone(state), losses._replace(retain=seen))
        return stepped._replace(controller_state=Ahead(stepped.controller_state, seen))

    def after(state: SurgeryState, losses: eu.Losses, observed: jax.Array) -> SurgeryState:
        return state._replace(controller_state=state.controller_state._replace(seen=observed))

    return packaged._replace(
        init=init,
        before=before,
        after=after,
        weights=lambda state, losses: packaged.weights(alone(state), losses),
        holds=lambda state: packaged.holds(alone(state)),
        observes="lookahead",
    )


def seeing_the_full_loss(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    budget: Number,
    baseline: Number,
    full_retain_loss: Callable[[Params], jax.Array],
) -> Method:
    """EUPMU with a budget, whose retain loss has the full set's value and the batch's gradient."""
    losses_fn = with_value_of(forget_and_retain(losses), full_retain_loss)
    return method_of(eu.eupmu(losses_fn, optimizer, eu.Budget(budget, baseline=baseline)))


def with_value_of(losses_fn: BatchLosses, retain_loss: Callable[[Params], jax.Array]) -> BatchLosses:
    """The same losses and gradients, but for the value of the retain loss."""

    def full_losses(params, batch):
        losses = losses_fn(params, batch)
        # The difference is zero, and has the batch's gradient.
        shown = jax.lax.stop_gradient(retain_loss(params))
        return losses._replace(retain=shown + (losses.retain - jax.lax.stop_gradient(losses.retain)))

    return full_losses


def released(
    losses: LossFunctions, optimizer: optax.GradientTransformation, *, budget: Number, baseline: Number
) -> Method:
    """No budget: the released code's dual optimiser and a demand of .02 nats a step."""
    del budget, baseline
    dual = optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0))
    return eupmu(losses, optimizer, demand=0.02, measure="lagged", dual_optimizer=dual, log_losses=True)


def budget_knobs(budget: float, baseline: float) -> dict[str, float]:
    return {"budget": budget, "baseline": baseline}


class Contender(NamedTuple):
    """One way to descend, with a budget or without.

    Attributes:
      make: (losses, optimizer, **knobs) -> Method.
      knobs: (budget, baseline) -> what make is given.
      sees_all: whether make also takes full_retain_loss, params -> the retain loss of the whole set.
      is_repaired: whether the end of a run is measured and brought back within its budget, as in `unlearn`.
    """

    make: Callable[..., Method]
    knobs: Callable[[float, float], dict[str, float]] = budget_knobs
    sees_all: bool = False
    is_repaired: bool = False


def of_controller(make: MakeController) -> Contender:
    return Contender(partial(steered, make))


EUPMU = "EUPMU budget"
UNREPAIRED = "EUPMU budget, not repaired"
RELEASED = "released dual, no budget"
CONTROLLERS: dict[str, Contender] = {
    EUPMU: Contender(eupmu_budget, is_repaired=True),
    UNREPAIRED: Contender(eupmu_budget),
    "exact surgery budget": Contender(exact_surgery_budget),
    "EUPMU budget, seeing the full loss": Contender(seeing_the_full_loss, sees_all=True),
    "EUPMU budget, looking ahead": of_controller(looking_ahead),
    "PID, fixed gains": of_controller(fixed_gains),
    "multiplicative": of_controller(multiplicative),
    "PI on lambda": of_controller(proportional_integral),
    "dual ascent, SGD 0.1": of_controller(dual_ascent(optax.sgd(0.1))),
    "dual ascent, SGD 1": of_controller(dual_ascent(optax.sgd(1.0))),
    "dual ascent, Adam 0.05": of_controller(dual_ascent(optax.adam(0.05))),
    "dual ascent, Adam 0.5": of_controller(dual_ascent(optax.adam(0.5))),
    "secant steps": of_controller(secant),
    "barrier tolerance": of_controller(barrier),
    RELEASED: Contender(released),
}
"""By display name, in the order of tables."""
