"""Exact surgery under a budget."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu
from eupmu_jax.method.budget import MEASURING_STEPS, TARGET
from tests.quadratics import C32, drive


def run_exact(tx, losses_fn, x, steps):
    """`explicit_surgery` in a chain, for so many steps: (x, state), and x after each."""
    grads_fn = eu.forget_and_retain_grads(losses_fn)

    def step(carry, _):
        x, state = carry
        losses, forget_grads, retain_grads = grads_fn(x, ())
        updates, state = tx.update(forget_grads, state, x, retain_grads=retain_grads, losses=losses)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    return jax.lax.scan(step, (x, tx.init(x)), length=steps)


@pytest.mark.parametrize("rate", [0.01, 0.03])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_exact_surgery_ends_where_eupmu_does(rate, momentum):
    """One and three budgets, closed loop around the projection: the KKT point of both."""
    budgets = jnp.array([0.1, 0.2, 0.15])
    for retain, budget in ((lambda x: jnp.sum(x**2), 0.1), (lambda x: x**2, budgets)):
        losses_fn = lambda x, batch, retain=retain: eu.Losses(jnp.sum((x - C32) ** 2), retain(x))
        known = eu.Budget(budget, baseline=0.0)
        inner = optax.sgd(rate, momentum=momentum)
        exact = optax.chain(eu.explicit_surgery(known), inner)
        (x, state), _ = run_exact(exact, losses_fn, jnp.zeros(3), 3000)
        np.testing.assert_allclose(retain(x) / budget, TARGET, rtol=2e-3)
        tx = eu.eupmu(losses_fn, inner, known, initial_multiplier=jnp.ones(jnp.shape(budget)))
        (same, _), _ = drive(tx, retain, jnp.zeros(3), steps=3000)
        np.testing.assert_allclose(x, same, rtol=2e-3, atol=1e-4)
        assert not np.any(eu.surgery_info(state).infeasible)


def test_exact_surgery_measures_its_baseline_and_skips_bad_steps():
    losses_fn = lambda x, batch: eu.Losses(jnp.sum((x - C32) ** 2), 0.7 + jnp.sum(x**2))
    tx = eu.explicit_surgery(eu.Budget(0.1))
    (x, state), path = run_exact(optax.chain(tx, optax.sgd(0.01)), losses_fn, jnp.zeros(3), 12)
    assert not np.any(path[: MEASURING_STEPS - 1])
    assert np.all(x != 0)
    np.testing.assert_allclose(state[0].controller_state.baseline, 0.7, rtol=1e-6)
    losses, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(x, ())
    bad = losses._replace(retain=jnp.nan * losses.retain)
    updates, skipped = tx.update(forget_grads, state[0], x, retain_grads=retain_grads, losses=bad)
    assert not np.any(updates)
    chex.assert_trees_all_equal(skipped, state[0]._replace(skipped_steps=state[0].skipped_steps + 1))
    with pytest.raises(TypeError, match="losses="):
        tx.update(forget_grads, state[0], x, retain_grads=retain_grads)
    three = losses._replace(retain=jnp.ones(3))
    with pytest.raises(ValueError, match="budget total must have the shape"):
        tx.update(forget_grads, state[0], x, retain_grads=retain_grads, losses=three)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_the_multiplier_is_no_narrower_than_the_parameters(dtype, expected, x64):
    losses_fn = lambda x, batch: eu.Losses(jnp.sum((x - 1) ** 2), jnp.sum(x**2))
    tx, x = eu.explicit_surgery(eu.Budget(0.1, baseline=0.0)), jnp.full(3, 0.5, dtype)
    losses, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(x, ())
    state = tx.init(x)
    _, after = tx.update(forget_grads, state, x, retain_grads=retain_grads, losses=losses)
    assert state.multiplier.dtype == after.multiplier.dtype == expected
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"measure": "lookahead"}, "measure"),
        ({"dual_optimizer": optax.sgd(0.1)}, "dual_optimizer"),
        ({"log_losses": True}, "log_losses"),
        ({"normalize_weights": False}, "normalize_weights"),
        ({"measure": "directional", "log_losses": True}, "measure, log_losses"),
    ],
)
def test_exact_surgery_refuses_more_of_a_tolerance_than_eps(settings, named):
    with pytest.raises(ValueError, match=f"no use for {named}: give Tolerance"):
        eu.explicit_surgery(eu.Tolerance(0.1, **settings))


def test_the_projection_is_batched():
    """vmap over problems solves each one's programme as alone."""
    rng = np.random.default_rng(0)
    forget, retain = rng.normal(size=(16, 7)), rng.normal(size=(16, 4, 7))
    slack = jnp.asarray(0.1 * rng.normal(size=(16, 4)), jnp.float32)
    inputs = (jnp.asarray(forget, jnp.float32), jnp.asarray(retain, jnp.float32), slack)
    directions, multipliers = jax.jit(jax.vmap(eu.unilateral_projection))(*inputs)
    alone = jax.jit(eu.unilateral_projection)
    for i in range(16):
        direction, multiplier = alone(*(leaf[i] for leaf in inputs))
        np.testing.assert_allclose(directions[i], direction, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(multipliers[i], multiplier, rtol=1e-4, atol=1e-5)
