"""Exact unilateral gradient surgery: the closed form that EUPMU approaches, from two gradients."""

import optax

import eupmu_jax as eu
from experiments.shared.methods.method import Apply, Method, descend, random_label_losses, record


def exact_surgery(apply: Apply, optimizer: optax.GradientTransformation, *, demand) -> Method:
    """Descends along g_f + lambda* g_r, the nearest to g_f that keeps <g_r, d> >= demand.

    Source: arXiv 2510.22124; with demand 0 this is GRU, arXiv 2503.09117.
    """
    grads_fn = eu.forget_and_retain_grads(random_label_losses(apply))

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        direction, multiplier = eu.unilateral_projection(forget_grads, retain_grads, tolerance=-demand)
        params, state = descend(optimizer, direction, state, params)
        return params, state, record(*losses, multiplier)

    return Method(lambda params, batches: optimizer.init(params), step)


def exact_surgery_budget(
    apply: Apply, optimizer: optax.GradientTransformation, *, budget, baseline
) -> Method:
    """`eupmu_jax.explicit_surgery` with a budget for the whole run."""
    grads_fn = eu.forget_and_retain_grads(random_label_losses(apply))
    tx = optax.chain(eu.explicit_surgery(budget=budget, retain_baseline=baseline), optimizer)

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        updates, state = tx.update(forget_grads, state, params, retain_grads=retain_grads, losses=losses)
        params = optax.apply_updates(params, updates)
        return params, state, record(*losses, eu.multiplier(state))

    return Method(lambda params, batches: tx.init(params), step)
