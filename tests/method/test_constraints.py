"""A constraint is plain data, also as a hyper-parameter; a controller of one's own steers the method."""

import dataclasses
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu
from eupmu_jax.method.controller import Controller, by_multiplier
from eupmu_jax.method.eupmu import controlled
from eupmu_jax.method.losses import is_usable
from eupmu_jax.method.state import initial_state
from tests.costs import eupmu_step, linear_step
from tests.quadratics import quadratics

CONSTRAINTS = [
    eu.Tolerance(0.1),
    eu.Tolerance([0.1, -0.2], measure="directional", log_losses=True, normalize_weights=False),
    eu.Budget(0.1),
    eu.Budget(np.array([0.5, 1.0]), baseline=jnp.array([0.25, 2.0])),
    eu.Budget(np.int64(2), baseline=jnp.float32(0.5)),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
def test_printed_stored_and_back(constraint):
    names = {"Tolerance": eu.Tolerance, "Budget": eu.Budget}
    assert eval(repr(constraint), names) == constraint
    stored = json.loads(json.dumps(dataclasses.asdict(constraint)))
    assert type(constraint)(**stored) == constraint
    assert dataclasses.replace(constraint) == constraint


def test_compared_by_value():
    assert eu.Tolerance(1) == eu.Tolerance(np.float32(1.0)) == eu.Tolerance(jnp.array(1.0))
    assert eu.Budget([1, 2]) == eu.Budget(np.array([1.0, 2.0])) == eu.Budget((1.0, 2.0))
    different = {*CONSTRAINTS, eu.Tolerance(0.1, measure="lookahead"), eu.Budget(0.1, baseline=0.1)}
    assert len(different) == len(CONSTRAINTS) + 2
    assert eu.Tolerance(0.1) != eu.Budget(0.1)
    schedule = optax.constant_schedule(0.1)
    assert eu.Tolerance(schedule).eps is schedule


def test_all_but_the_bound_is_named_and_nothing_changes_later():
    with pytest.raises(TypeError, match="positional"):
        eu.Tolerance(0.1, "lagged")
    with pytest.raises(TypeError, match="positional"):
        eu.Budget(0.1, 0.5)
    for constraint, name in ((eu.Tolerance(0.1), "eps"), (eu.Budget(0.1), "total")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(constraint, name, 1.0)


@pytest.mark.parametrize("measure", ["lookahead", "lagged", "directional"])
@pytest.mark.parametrize("shape", [(), (2,)], ids=["one", "K=2"])
def test_an_injected_tolerance_changes_in_a_compiled_step(measure, shape, x64):
    curvature = np.array([[3.0, 0.3, 0.3], [0.3, 2.0, 0.3]]) if shape else 1.0
    losses_fn, _ = quadratics(curvature)

    def make(eps):
        tolerance, first = eu.Tolerance(eps, measure=measure), jnp.ones(shape)
        return eu.eupmu(losses_fn, optax.sgd(0.02), tolerance, initial_multiplier=first)

    # Each utility another one, so that an exchange of the two would show.
    before, after = 0.1 + 0.1 * np.arange(2), -0.5 - 0.3 * np.arange(2)
    before, after = (before, after) if shape else (before[0], after[0])

    def run(step, carry):
        for _ in range(4):
            carry = step(*carry, ())
        return carry

    tx = optax.inject_hyperparams(make)(eps=jnp.asarray(before))
    step = jax.jit(eupmu_step(tx))
    x, state = run(step, (jnp.zeros(3), tx.init(jnp.zeros(3))))
    state.hyperparams["eps"] = jnp.asarray(after)
    changed = run(step, (x, state))
    assert step._cache_size() == 1

    scheduled = optax.inject_hyperparams(make)(eps=lambda count: jnp.where(count < 4, before, after))
    ends = [
        changed,
        run(step := jax.jit(eupmu_step(scheduled)), run(step, (jnp.zeros(3), scheduled.init(jnp.zeros(3))))),
    ]
    plain, other = (jax.jit(eupmu_step(make(eps))) for eps in (before, after))
    start = jnp.zeros(3), make(before).init(jnp.zeros(3))
    expected_x, expected = run(other, run(plain, start))
    for x, state in ends:
        chex.assert_trees_all_close((x, state.inner_state), (expected_x, expected), rtol=1e-12)
    unchanged = eu.surgery_info(run(plain, run(plain, start))[1])
    assert np.all(unchanged.violation != eu.surgery_info(expected).violation)
    assert np.all(unchanged.multiplier != eu.multiplier(expected))


# Controllers of one's own.


def constant(multiplier, **parts):
    """A Controller that leaves the multiplier where it is."""
    keep = Controller(
        init=lambda: initial_state(multiplier, lambda multiplier: ()),
        before=lambda state, losses: state,
        after=lambda state, losses, observed: state,
        weights=partial(by_multiplier, log_losses=False, normalize_weights=False),
        usable=partial(is_usable, log_losses=False),
        holds=lambda state: jnp.asarray(False),
        observes="nothing",
    )
    return keep._replace(**parts)


def network(params, batch):
    loss = lambda part: jnp.mean((jnp.tanh(part @ params["w"]) @ params["v"] - 1) ** 2)
    return eu.Losses(loss(batch[0]), loss(batch[1]))


def network_problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return {"w": draw(5, 8), "v": draw(8)}, (draw(16, 5), draw(24, 5))


def test_a_constant_multiplier_is_linear_scalarisation(x64):
    params, batch = network_problem()
    inner = optax.sgd(0.05, momentum=0.9)
    tx = controlled(network, inner, constant(0.5))
    step, linear = jax.jit(eupmu_step(tx)), jax.jit(linear_step(network, inner))
    ours, theirs = (params, tx.init(params)), (params, inner.init(params))
    for _ in range(20):
        ours = step(*ours, batch)
        *theirs, losses = linear(*theirs, batch)
    chex.assert_trees_all_equal((ours[0], ours[1].inner_state), tuple(theirs))
    info = eu.surgery_info(ours[1])
    np.testing.assert_allclose([info.forget_loss, info.retain_loss], losses, rtol=1e-6)
    assert float(info.multiplier) == 0.5


@pytest.mark.parametrize("observes", ["nothing", "lookahead", "directional"])
def test_what_a_controller_observes(observes, x64):
    """R(theta_{t+1}) on the same batch, or -<grad R, d_t>; `before` sees the losses at theta_t."""
    params, batch = network_problem()
    seen = constant(
        jnp.float64(2.0),
        before=lambda state, losses: state._replace(multiplier=losses.retain, violation=losses.forget),
        after=lambda state, losses, observed: state._replace(violation=observed),
        observes=observes,
    )
    tx = controlled(network, optax.sgd(0.1), seen)
    after, state = jax.jit(eupmu_step(tx))(params, tx.init(params), batch)
    losses, forget_grads, retain_grads = eu.forget_and_retain_grads(network)(params, batch)
    direction = jax.tree.map(lambda f, r: f + losses.retain * r, forget_grads, retain_grads)
    moved = jax.tree.map(lambda p, d: p - 0.1 * d, params, direction)
    chex.assert_trees_all_close(after, moved, rtol=1e-12)
    expected = {
        "nothing": losses.forget,
        "lookahead": network(moved, batch).retain,
        "directional": -optax.tree.vdot(retain_grads, direction),
    }[observes]
    info = eu.surgery_info(state)
    np.testing.assert_allclose(info.violation, expected, rtol=1e-12)
    np.testing.assert_allclose(info.multiplier, losses.retain, rtol=1e-12)


def test_a_controller_holds_the_parameters_or_skips_the_step():
    params, batch = network_problem()
    inner = optax.adam(0.1)
    never, always = (lambda _: jnp.asarray(False)), (lambda _: jnp.asarray(True))
    for parts, applied, skipped in (({"holds": always}, 1, 0), ({"usable": never}, 0, 1)):
        tx = controlled(network, inner, constant(0.5, **parts))
        after, state = jax.jit(eupmu_step(tx))(params, tx.init(params), batch)
        chex.assert_trees_all_equal((after, state.inner_state), (params, inner.init(params)))
        counted = (int(state.surgery.applied_steps), int(state.surgery.skipped_steps))
        assert counted == (applied, skipped)
