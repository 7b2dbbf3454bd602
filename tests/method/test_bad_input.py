"""Bad input: a clear error where one can be raised, a skipped and counted step under jit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu

SGD = optax.sgd(0.1, momentum=0.9)
X = {"w": jnp.array([1.0, 2.0])}
TOLERANCE = eu.Tolerance(0.0)
LOOKAHEAD = eu.Tolerance(0.0, measure="lookahead")
MEASURES = ("lookahead", "lagged", "directional")


def losses_fn(params, batch):
    """Both losses times the batch's two factors, so that a test can break either."""
    square = jnp.sum(params["w"] ** 2)
    return eu.Losses(batch[0] * square, batch[1] * square)


def first_update(losses_fn, params=X, batch=(1.0, 1.0), constraint=LOOKAHEAD, **settings):
    tx = eu.eupmu(losses_fn, SGD, constraint, **settings)
    return tx.update(None, tx.init(params), params, batch=batch)


@pytest.mark.parametrize(
    ("losses_fn", "error", "match"),
    [
        (lambda p, b: p["w"].sum(), TypeError, r"must return eupmu_jax\.Losses"),
        (lambda p, b: (p["w"].sum(), p["w"].sum()), TypeError, "got tuple"),
        (lambda p, b: eu.Losses(p["w"], p["w"].sum()), ValueError, "Losses.forget must be a scalar"),
        (lambda p, b: eu.Losses(p["w"].sum(), p["w"][None]), ValueError, r"Losses.retain.*shape \(1, 2\)"),
        (lambda p, b: eu.Losses(p["w"].sum(), p["w"]), ValueError, "initial_multiplier"),
        (lambda p, b: eu.Losses(jnp.int32(1), p["w"].sum()), TypeError, "Losses.forget must be floating"),
        (lambda p, b: eu.Losses("a", p["w"].sum()), TypeError, "Losses.forget"),
        (lambda p, b: eu.Losses(p["w"].sum(), None), TypeError, "Losses.retain"),
        (lambda p, b: eu.Losses(p["w"].sum(), eu.Mean(3, 1)), TypeError, "Losses.retain must be floating"),
        (
            lambda p, b: eu.Losses(p["w"].sum(), eu.Mean(p["w"].sum(), None)),
            TypeError,
            "count of Losses.retain",
        ),
        (lambda p, b: eu.Losses(eu.Mean(p["w"].sum(), p["w"]), 1.0), ValueError, "count of Losses.forget"),
    ],
)
def test_losses_fn_returns_something_else(losses_fn, error, match):
    with pytest.raises(error, match=match):
        first_update(losses_fn)
    surgery = eu.implicit_surgery(TOLERANCE)
    with pytest.raises(error, match=match):
        surgery.value_and_grad(losses_fn)(X, (), surgery.init(X))


@pytest.mark.parametrize(
    ("eps", "settings", "error", "match"),
    [
        (0.0, {"measure": "look-ahead"}, ValueError, "lagged, lookahead, directional"),
        (0.0, {"dual_optimizer": 0.1}, TypeError, "dual_optimizer must be an optax"),
        (0.0, {"dual_optimizer": optax.adam}, TypeError, "dual_optimizer must be an optax"),
        (float("inf"), {}, ValueError, "tolerance eps must be finite"),
        ([0.1, float("nan")], {}, ValueError, "tolerance eps must be finite"),
        (jnp.zeros((2, 2)), {}, ValueError, "tolerance eps must be a number or of shape"),
        ([], {}, ValueError, "tolerance eps must be a number or of shape"),
        ("0.1", {}, TypeError, "tolerance eps must be a real number"),
        (None, {}, TypeError, "tolerance eps must be a real number"),
        (True, {}, TypeError, "tolerance eps must be a real number"),
        (1j, {}, TypeError, "tolerance eps must be a real number"),
    ],
)
def test_what_is_no_tolerance(eps, settings, error, match):
    with pytest.raises(error, match=match):
        eu.Tolerance(eps, **settings)


@pytest.mark.parametrize(
    ("eps", "multiplier", "error", "match"),
    [
        (0.0, -1.0, ValueError, "initial_multiplier must be finite and >= 0"),
        (0.0, [1.0, -1.0], ValueError, "initial_multiplier must be finite and >= 0"),
        (0.0, float("nan"), ValueError, "initial_multiplier must be finite and >= 0"),
        (0.0, jnp.ones((2, 2)), ValueError, "initial_multiplier must be a scalar or"),
        (0.0, None, TypeError, "initial_multiplier must be a real number"),
        (0.0, jnp.ones(0), ValueError, "initial_multiplier must be a scalar or"),
        (jnp.zeros(3), 1.0, ValueError, "tolerance eps must be a scalar or have the shape"),
        (jnp.zeros(3), jnp.ones(2), ValueError, "tolerance eps must be a scalar or have the shape"),
    ],
)
def test_a_multiplier_that_does_not_go_with_the_tolerance(eps, multiplier, error, match):
    with pytest.raises(error, match=match):
        eu.eupmu(losses_fn, SGD, eu.Tolerance(eps, measure="lookahead"), initial_multiplier=multiplier)
    with pytest.raises(error, match=match):
        eu.implicit_surgery(eu.Tolerance(eps), initial_multiplier=multiplier)


@pytest.mark.parametrize(
    ("inner", "error", "match"),
    [
        (0.1, TypeError, "inner must be an optax"),
        (optax.MultiSteps(SGD, 2), TypeError, "gradient_transformation"),
        (None, ValueError, "give inner"),
    ],
)
def test_inner(inner, error, match):
    with pytest.raises(error, match=match):
        eu.eupmu(losses_fn, inner, LOOKAHEAD)


@pytest.mark.parametrize("constraint", [None, 0.1, {"eps": 0.1}, optax.constant_schedule(0.1), eu.Budget])
def test_a_constraint_is_a_tolerance_or_a_budget(constraint):
    """A number could be either, so that neither is guessed."""
    for make in (
        lambda: eu.eupmu(losses_fn, SGD, constraint),
        lambda: eu.implicit_surgery(constraint),
        lambda: eu.explicit_surgery(constraint),
    ):
        with pytest.raises(
            TypeError, match=r"constraint must be eupmu_jax\.Budget\(total\).*Tolerance\(eps\)"
        ):
            make()


def test_a_constraint_must_be_given():
    for make in (lambda: eu.eupmu(losses_fn, SGD), eu.implicit_surgery, eu.explicit_surgery):
        with pytest.raises(TypeError, match="constraint"):
            make()


@pytest.mark.parametrize("measure", ["lookahead", "directional"])
def test_implicit_surgery_refuses_a_measure_of_the_step(measure):
    with pytest.raises(ValueError, match=f"does not see the step that is taken, which measure='{measure}'"):
        eu.implicit_surgery(eu.Tolerance(0.0, measure=measure))


def test_losses_fn_is_no_function():
    with pytest.raises(TypeError, match="losses_fn must be a function"):
        eu.eupmu(jnp.ones(2), SGD, TOLERANCE)
    with pytest.raises(TypeError, match="losses_fn must be a function"):
        eu.implicit_surgery(TOLERANCE).value_and_grad(3)
    with pytest.raises(TypeError, match="losses_fn must be a function"):
        eu.forget_and_retain_grads(None)


def test_schedule_of_the_wrong_shape():
    for measure in MEASURES:
        tolerance = eu.Tolerance(lambda step: jnp.zeros(2), measure=measure)
        with pytest.raises(ValueError, match="tolerance eps must be a scalar or have the shape"):
            first_update(losses_fn, constraint=tolerance)


def test_missing_arguments():
    tx = eu.eupmu(losses_fn, SGD, LOOKAHEAD)
    with pytest.raises(TypeError, match="batch="):
        tx.update(None, tx.init(X), X)
    with pytest.raises(TypeError, match="params"):
        tx.update(None, tx.init(X), batch=(1.0, 1.0))
    with pytest.raises(ValueError, match="updates must be None or a pytree like params"):
        tx.update(jnp.ones(2), tx.init(X), X, batch=(1.0, 1.0))
    surgery = eu.implicit_surgery(TOLERANCE)
    with pytest.raises(TypeError, match="losses="):
        surgery.update(X, surgery.init(X), X)
    with pytest.raises(TypeError, match=r"losses must be eupmu_jax\.Losses"):
        surgery.update(X, surgery.init(X), X, losses=(1.0, 1.0))
    exact = eu.explicit_surgery(TOLERANCE)
    with pytest.raises(TypeError, match="retain_grads="):
        exact.update(X, exact.init(X), X)


def test_number_of_utilities_changes():
    two = lambda p, b: eu.Losses(p["w"].sum(), p["w"])
    changing = lambda p, b: two(p, b) if b else losses_fn(p, (1.0, 1.0))
    tx = eu.eupmu(changing, SGD, LOOKAHEAD, initial_multiplier=jnp.ones(2))
    _, state = tx.update(None, tx.init(X), X, batch=(1,))
    with pytest.raises(ValueError, match=r"shape \(\).*initial_multiplier has shape \(2,\)"):
        tx.update(None, state, X, batch=())
    surgery = eu.implicit_surgery(TOLERANCE, initial_multiplier=jnp.ones(2))
    with pytest.raises(ValueError, match="initial_multiplier"):
        surgery.update(X, surgery.init(X), X, losses=eu.Losses(1.0, 1.0))


@pytest.mark.parametrize("leaf", [jnp.array([1, 2]), jax.random.key(0), jnp.array(True), jnp.array(1j)])
def test_leaves_that_are_not_real_floating_point(leaf):
    params = X | {"other": leaf}
    for call in (
        lambda: first_update(losses_fn, params),
        lambda: eu.forget_and_retain_grads(losses_fn)(params, (1.0, 1.0)),
        lambda: eu.implicit_surgery(TOLERANCE).value_and_grad(losses_fn)(
            params, (1.0, 1.0), eu.implicit_surgery(TOLERANCE).init(X)
        ),
        lambda: eu.unilateral_projection(params, params),
    ):
        with pytest.raises(TypeError, match=r"\['other'\].*freeze"):
            call()


@pytest.mark.parametrize(
    ("forget", "retain", "tolerance", "error"),
    [
        (jnp.ones(3), jnp.ones(2), 0.0, ValueError),
        (jnp.ones(3), {"w": jnp.ones(3)}, 0.0, ValueError),
        ((jnp.ones(3), jnp.ones(2)), (jnp.ones((2, 3)), jnp.ones((4, 2))), 0.0, ValueError),
        (jnp.ones(3), jnp.ones((2, 3)), jnp.zeros(3), ValueError),
        (jnp.ones(3), jnp.ones(3), jnp.zeros(3), ValueError),
        (jnp.ones(3), jnp.ones(3), float("nan"), ValueError),
        (jnp.ones(3), jnp.ones(3), lambda step: 0.0, TypeError),
        (jnp.ones(3), None, 0.0, TypeError),
        (jnp.array([1, 2, 3]), jnp.ones(3), 0.0, TypeError),
        (jnp.ones(3), jnp.ones((0, 3)), 0.0, ValueError),
    ],
)
def test_projection_of_what_does_not_fit(forget, retain, tolerance, error):
    with pytest.raises(error, match=r"retain_grads|tolerance|forget_grads"):
        eu.unilateral_projection(forget, retain, tolerance)


def test_explicit_surgery_refuses_a_schedule():
    with pytest.raises(TypeError, match="inject_hyperparams"):
        eu.explicit_surgery(eu.Tolerance(optax.constant_schedule(0.1)))


def test_has_aux_without_aux():
    surgery = eu.implicit_surgery(TOLERANCE)
    with pytest.raises(TypeError, match=r"\(Losses, aux\)"):
        surgery.value_and_grad(losses_fn, has_aux=True)(X, (1.0, 1.0), surgery.init(X))


# Faults that only show at run time.

BAD_BATCHES = {
    "forget NaN": (jnp.nan, 1.0),
    "retain NaN": (1.0, jnp.nan),
    "forget inf": (jnp.inf, 1.0),
    "retain inf": (1.0, jnp.inf),
    "forget negative": (-1.0, 1.0),
    "retain negative": (1.0, -1.0),
    "forget zero": (0.0, 1.0),
    "retain zero": (1.0, 0.0),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_eupmu_skips_a_bad_step_whole(measure):
    tx = eu.eupmu(losses_fn, SGD, eu.Tolerance(0.0, measure=measure, log_losses=True))
    update = jax.jit(tx.update)
    params, state = X, tx.init(X)
    for _ in range(2):
        updates, state = update(None, state, params, batch=(1.0, 1.0))
        params = optax.apply_updates(params, updates)
    for count, batch in enumerate(BAD_BATCHES.values(), start=1):
        updates, after = update(None, state, params, batch=batch)
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
        assert int(eu.surgery_info(after).skipped_steps) == count
        kept = after._replace(surgery=after.surgery._replace(skipped_steps=state.surgery.skipped_steps))
        chex.assert_trees_all_equal(kept, state)
        state = after
    updates, _ = update(None, state, params, batch=(1.0, 1.0))
    assert np.all(updates["w"] != 0)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_mean_of_no_examples_skips_the_step(measure):
    def losses_fn(params, count):
        return eu.Losses(jnp.sum(params["w"]), eu.Mean(count * jnp.sum(params["w"] ** 2), count))

    tx = eu.eupmu(losses_fn, SGD, eu.Tolerance(0.0, measure=measure))
    updates, state = jax.jit(tx.update)(None, tx.init(X), X, batch=jnp.array(0))
    chex.assert_trees_all_equal(updates, {"w": jnp.zeros(2)})
    assert int(eu.surgery_info(state).skipped_steps) == 1
    updates, state = jax.jit(tx.update)(None, state, X, batch=jnp.array(2))
    assert int(eu.surgery_info(state).skipped_steps) == 1
    assert np.all(updates["w"] != 0)


@pytest.mark.parametrize("measure", MEASURES)
def test_raw_space_needs_finite_losses_only(measure):
    tx = eu.eupmu(losses_fn, SGD, eu.Tolerance(0.0, measure=measure))
    for name, batch in BAD_BATCHES.items():
        _, state = jax.jit(tx.update)(None, tx.init(X), X, batch=batch)
        bad = "NaN" in name or "inf" in name
        assert int(eu.surgery_info(state).skipped_steps) == bad, name


@pytest.mark.parametrize("measure", MEASURES)
def test_non_finite_gradient_of_finite_losses(measure):
    root = lambda params, batch: eu.Losses(1 + jnp.sum(jnp.sqrt(params["w"] * batch)), jnp.float32(1))
    tx = eu.eupmu(root, SGD, eu.Tolerance(0.0, measure=measure))
    updates, state = jax.jit(tx.update)(None, tx.init(X), X, batch=0.0)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(X))
    assert int(eu.surgery_info(state).skipped_steps) == 1


@pytest.mark.parametrize("after", [jnp.nan, jnp.inf, -1.0])
def test_bad_lookahead_alone_rolls_the_whole_step_back(after):
    """The losses are good at params and bad wherever inner moves."""

    def trap(params, batch):
        del batch
        here = jnp.all(params["w"] == X["w"])
        retain = jnp.where(here, jnp.sum(params["w"] ** 2), after)
        return eu.Losses(jnp.sum(params["w"] ** 2), retain)

    tx = eu.eupmu(trap, SGD, eu.Tolerance(0.0, measure="lookahead", log_losses=True))
    start = tx.init(X)
    updates, state = jax.jit(tx.update)(None, start, X, batch=())
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(X))
    chex.assert_trees_all_equal(state.inner_state, start.inner_state)
    assert float(eu.multiplier(state)) == 1.0
    assert int(eu.surgery_info(state).skipped_steps) == 1


def test_a_dual_step_that_overflows_is_not_taken():
    tolerance = eu.Tolerance(-1e3, measure="lookahead", dual_optimizer=optax.scale(-3e38))
    tx = eu.eupmu(losses_fn, SGD, tolerance)
    updates, state = tx.update(None, tx.init(X), X, batch=(1.0, 1.0))
    assert float(eu.multiplier(state)) == 1.0
    assert int(eu.surgery_info(state).skipped_steps) == 1
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(X))


@pytest.mark.parametrize("through", ["lookahead", "lagged", "implicit"])
def test_a_huge_finite_loss_does_not_freeze_the_multiplier(through):
    """Squared in Adam's second moment it would be inf, and every later dual step 0."""
    if through == "implicit":
        tx = eu.implicit_surgery(eu.Tolerance(-0.1))
    else:
        factor = lambda p, b: eu.Losses(jnp.sum(p["w"] ** 2), b[0] + b[1] * p["w"][0])
        tx = eu.eupmu(factor, SGD, eu.Tolerance(-0.1, measure=through))
    update = jax.jit(tx.update)
    state = tx.init(X)
    for _ in range(4):
        for scale in (1.0, 1e21, 1.0):
            one = jnp.float32(1)
            losses = eu.Losses(one, one * scale)
            batch = (one, one * (scale if scale > 1 else 0.0))
            _, state = update(X if through == "implicit" else None, state, X, losses=losses, batch=batch)
    assert int(eu.surgery_info(state).skipped_steps) == 4
    before = float(eu.multiplier(state))
    for _ in range(3):
        _, state = update(X if through == "implicit" else None, state, X, losses=losses, batch=batch)
    assert float(eu.multiplier(state)) > before


def test_a_foreign_state():
    for tx in (eu.eupmu(losses_fn, SGD, LOOKAHEAD), eu.implicit_surgery(TOLERANCE)):
        with pytest.raises(TypeError, match="state must come from"):
            tx.update(X, optax.EmptyState(), X, batch=(1.0, 1.0), losses=eu.Losses(1.0, 1.0))


@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_updates_of_another_shape(shape):
    tx = eu.eupmu(losses_fn, SGD, LOOKAHEAD)
    with pytest.raises(ValueError, match="updates must be None or a pytree like params"):
        tx.update({"w": jnp.ones(shape)}, tx.init(X), X, batch=(1.0, 1.0))


def test_axis_name_outside_of_a_mapped_function():
    with pytest.raises(ValueError, match="axis_name='data'"):
        jax.jit(lambda x: first_update(losses_fn, x, axis_name="data"))(X)


def test_implicit_surgery_zeroes_its_output_and_keeps_its_state():
    surgery = eu.implicit_surgery(eu.Tolerance(0.0, log_losses=True))
    state = surgery.init(X)
    _, state = surgery.update(X, state, X, losses=eu.Losses(jnp.float32(1), jnp.float32(2)))
    one = jnp.float32(1)
    bad_losses = [eu.Losses(one * f, one * r) for f, r in BAD_BATCHES.values()]
    good = eu.Losses(one, one)
    for count, (grads, losses) in enumerate(
        [(X, losses) for losses in bad_losses] + [({"w": jnp.array([1.0, jnp.nan])}, good)], start=1
    ):
        updates, after = jax.jit(surgery.update)(grads, state, X, losses=losses)
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(X))
        assert int(after.skipped_steps) == count
        chex.assert_trees_all_equal(after._replace(skipped_steps=state.skipped_steps), state)
        state = after
    tx = optax.chain(surgery, SGD)
    losses = eu.Losses(jnp.float32(1), jnp.float32(1))
    _, state = tx.update(X, tx.init(X), X, losses=losses)
    moved, _ = tx.update(X, state, X, losses=losses._replace(forget=jnp.float32(jnp.nan)))
    assert np.all(moved["w"] != 0), "documented: momentum after implicit_surgery still moves"


def test_explicit_surgery_zeroes_a_non_finite_direction():
    tx = eu.explicit_surgery(TOLERANCE)
    bad = {"w": jnp.array([jnp.nan, 1.0])}
    for forget, retain in ((bad, X), (X, bad)):
        updates, _ = jax.jit(tx.update)(forget, tx.init(X), X, retain_grads=retain)
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(X))


def test_faults_under_scan_do_not_stop_a_run():
    batches = (jnp.ones(50), jnp.where(jnp.arange(50) % 7 == 3, jnp.nan, 1.0))
    tx = eu.eupmu(losses_fn, SGD, LOOKAHEAD)

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (X, tx.init(X)), batches)
    assert int(eu.surgery_info(state).skipped_steps) == 7
    assert np.all(np.isfinite(params["w"]))


def test_zero_retain_gradient_leaves_the_direction_and_reports_the_violation():
    losses_fn = lambda p, b: eu.Losses(jnp.sum(p["w"]), jnp.float32(1))
    tx = eu.eupmu(losses_fn, None, eu.Tolerance(-0.5, measure="directional"), initial_multiplier=0.0)
    direction, state = tx.update(None, tx.init(X), X, batch=())
    np.testing.assert_array_equal(direction["w"], jnp.ones(2))
    assert float(eu.surgery_info(state).violation) == 0.5
    assert np.isfinite(float(eu.multiplier(state)))
