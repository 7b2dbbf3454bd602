"""What else could steer the multiplier towards a budget: the alternatives that the study compares."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eupmu_jax.method import budget as pid
from eupmu_jax.method.losses import Losses
from experiments.shared.methods.eupmu import eupmu, eupmu_budget
from experiments.shared.methods.exact_surgery import exact_surgery_budget
from experiments.shared.methods.method import Apply, Method, descend, random_label_losses, record


class Rule(NamedTuple):
    """init() -> state; update(state, y, forget_loss) -> (multiplier, state).

    y is the observed share of the budget spent.
    """

    init: Callable[[], Any]
    update: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


def steered(
    rule: Rule,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    budget,
    baseline,
    observe: Callable[[Any], jax.Array] | None = None,
    ahead: bool = False,
) -> Method:
    """Descends (U + lambda R) / (1 + lambda) under the rule's lambda.

    It observes the batch's retain loss; or that of the last batch after the step on it (`ahead`); or
    observe(params).
    """
    losses_fn = random_label_losses(apply)

    def init(params, batches):
        del batches
        return rule.init(), optimizer.init(params), jnp.asarray(baseline, jnp.float32)

    def step(params, state, batch):
        rule_state, optimizer_state, seen_ahead = state
        losses, pull = jax.vjp(lambda params: losses_fn(params, batch), params)
        seen = observe(params) if observe else seen_ahead if ahead else losses.retain
        multiplier, rule_state = rule.update(rule_state, (seen - baseline) / budget, losses.forget)
        weights = losses._replace(forget=1 / (1 + multiplier), retain=multiplier / (1 + multiplier))
        params, optimizer_state = descend(optimizer, pull(weights)[0], optimizer_state, params)
        if ahead:
            seen_ahead = losses_fn(params, batch).retain
        seen = record(losses.forget, losses.retain, multiplier)
        return params, (rule_state, optimizer_state, seen_ahead), seen

    return Method(init, step)


def dual_ascent(optimizer: optax.GradientTransformation) -> Rule:
    """lambda <- max(0, lambda + optimiser's step along y - 1), lambda_0 = 1."""

    def update(state, y, forget_loss):
        del forget_loss
        multiplier, inner = state
        updates, inner = optimizer.update(1 - y, inner, multiplier)
        multiplier = jnp.maximum(0.0, multiplier + updates)
        return multiplier, (multiplier, inner)

    return Rule(lambda: (jnp.ones([]), optimizer.init(jnp.ones([]))), update)


def proportional_integral() -> Rule:
    """lambda = max(0, 1 + smoothed error + 0.03 sum of errors), as nuPI, arXiv 2406.04558."""

    def update(state, y, forget_loss):
        del forget_loss
        smoothed, total = state
        smoothed = 0.9 * smoothed + 0.1 * (y - 1)
        # The sum stops where the multiplier is 0: else it would have to climb back.
        total = jnp.maximum(total + 0.03 * (y - 1), -1 - smoothed)
        return jnp.maximum(0.0, 1 + smoothed + total), (smoothed, total)

    return Rule(lambda: (jnp.zeros([]), jnp.zeros([])), update)


def secant() -> Rule:
    """Dual ascent whose step is a tenth of the error over |dy / d lambda|, a secant of what was observed."""

    def update(state, y, forget_loss):
        del forget_loss
        multiplier, change, slope, smoothed = state
        smoothed_now = 0.8 * smoothed + 0.2 * y
        moved = jnp.abs(change) > 1e-6
        observed = jnp.abs(smoothed_now - smoothed) / jnp.where(moved, jnp.abs(change), 1.0)
        slope = jnp.where(moved, 0.95 * slope + 0.05 * observed, slope)
        change = jnp.clip(0.1 * (smoothed_now - 1) / jnp.maximum(slope, 1e-3), -1.0, 1.0)
        new = jnp.maximum(0.0, multiplier + change)
        return new, (new, new - multiplier, slope, smoothed_now)

    return Rule(lambda: (jnp.ones([]), jnp.zeros([]), jnp.ones([]), jnp.zeros([])), update)


def barrier() -> Rule:
    """Adam on the violation of one step, whose tolerance is a twentieth of what is left of the budget."""
    optimizer = optax.adam(0.05)

    def update(state, y, forget_loss):
        del forget_loss
        multiplier, inner, last, smoothed = state
        smoothed = 0.8 * smoothed + 0.2 * y
        updates, inner = optimizer.update(-(y - last - 0.05 * (1 - smoothed)), inner, multiplier)
        multiplier = jnp.maximum(0.0, multiplier + updates)
        return multiplier, (multiplier, inner, y, smoothed)

    start = jnp.ones([])
    return Rule(lambda: (start, optimizer.init(start), jnp.zeros([]), jnp.zeros([])), update)


def multiplicative() -> Rule:
    """log lambda <- log lambda + 0.1 (smoothed y - 1)."""

    def update(state, y, forget_loss):
        del forget_loss
        exponent, smoothed = state
        smoothed = 0.8 * smoothed + 0.2 * y
        exponent = jnp.clip(exponent + 0.1 * jnp.clip(smoothed - 1, -1, 4), pid.LOWEST, pid.HIGHEST)
        return jnp.exp(exponent), (exponent, smoothed)

    return Rule(lambda: (jnp.zeros([]), jnp.zeros([])), update)


def fixed_gains() -> Rule:
    """The package's controller with the same gains however noisy the observations, aimed at the budget."""

    def update(state, y, forget_loss):
        del forget_loss
        smoothed, total = state
        before, smoothed = smoothed, 0.8 * smoothed + 0.2 * y
        total = jnp.clip(total + 0.1 * (smoothed - 1), -3, 6)
        exponent = 3 * (smoothed - 1) + total + 10 * (smoothed - before)
        return jnp.exp(jnp.clip(exponent, -8, 8)), (smoothed, total)

    return Rule(lambda: (jnp.zeros([]), jnp.zeros([])), update)


def packaged() -> Rule:
    """The package's controller, to be given other observations."""

    def update(state, y, forget_loss):
        exponent, state = pid.control(state, Losses(forget_loss, y), jnp.ones([]))
        return pid.foresight(state) * jnp.exp(exponent), state

    return Rule(lambda: pid.init(jnp.ones([]), 0.0), update)


def released(apply: Apply, optimizer: optax.GradientTransformation, *, budget, baseline) -> Method:
    """No budget: the released code's dual optimiser and a demand of .02 nats a step."""
    del budget, baseline
    dual = optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0))
    return eupmu(apply, optimizer, demand=0.02, measure="lagged", dual_optimizer=dual, log_losses=True)


EUPMU = "EUPMU budget"
RELEASED = "released dual, no budget"
FULL_SIGHT = "EUPMU budget, seeing the full loss"
CONTROLLERS: dict[str, Callable[..., Method]] = {
    EUPMU: eupmu_budget,
    "exact surgery budget": exact_surgery_budget,
    FULL_SIGHT: partial(steered, packaged()),
    "EUPMU budget, looking ahead": partial(steered, packaged(), ahead=True),
    "PID, fixed gains": partial(steered, fixed_gains()),
    "multiplicative": partial(steered, multiplicative()),
    "PI on lambda": partial(steered, proportional_integral()),
    "dual ascent, SGD 0.1": partial(steered, dual_ascent(optax.sgd(0.1))),
    "dual ascent, SGD 1": partial(steered, dual_ascent(optax.sgd(1.0))),
    "dual ascent, Adam 0.05": partial(steered, dual_ascent(optax.adam(0.05))),
    "dual ascent, Adam 0.5": partial(steered, dual_ascent(optax.adam(0.5))),
    "secant steps": partial(steered, secant()),
    "barrier tolerance": partial(steered, barrier()),
    RELEASED: released,
}
"""By display name, in the order of tables."""
