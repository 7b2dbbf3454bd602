"""Exact unilateral gradient surgery: the closed form that EUPMU approaches, from two gradients."""

import jax
import optax

import eupmu_jax as eu
from experiments.shared.methods.method import LossFunctions, Method, descend, forget_and_retain, record


def exact_surgery(
    losses: LossFunctions, optimizer: optax.GradientTransformation, *, demand: jax.Array | float
) -> Method:
    """Descends along g_f + lambda* g_r, the nearest to g_f that keeps <g_r, d> >= demand.

    Source: arXiv 2510.22124; with demand 0 this is GRU, arXiv 2503.09117.
    """
    grads_fn = eu.forget_and_retain_grads(forget_and_retain(losses))

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        direction, multiplier = eu.unilateral_projection(forget_grads, retain_grads, tolerance=-demand)
        params, state = descend(optimizer, direction, state, params)
        return params, state, record(*losses, multiplier)

    return Method(lambda params, batches: optimizer.init(params), step)


def exact_surgery_budget(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    *,
    budget: jax.Array | float,
    baseline: jax.Array | float,
) -> Method:
    """`eupmu_jax.explicit_surgery` with a budget for the whole run."""
    grads_fn = eu.forget_and_retain_grads(forget_and_retain(losses))
    tx = optax.chain(eu.explicit_surgery(eu.Budget(budget, baseline=baseline)), optimizer)

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        updates, state = tx.update(forget_grads, state, params, retain_grads=retain_grads, losses=losses)
        params = optax.apply_updates(params, updates)
        return params, state, record(*losses, eu.multiplier(state))

    return Method(lambda params, batches: tx.init(params), step)
