"""The Lagrangian as a loss: the trajectory of `implicit_surgery` from a trainer that knows only gradients."""

from functools import partial

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu
from tests.parity import problem
from tests.representatives import one_or_three, slow_unless

STEPS = 40
CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.05, momentum=0.9))
INNERS = {
    "clipped momentum": CLIPPED,
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
}
DUAL = optax.sgd(3.0)


def constraints(utilities):
    shape = () if utilities == 1 else (3,)
    each = lambda low, high: np.linspace(low, high, 3) if shape else high
    return {
        "tolerance": eu.Tolerance(each(-0.02, 0.01), dual_optimizer=DUAL),
        "Adam's": eu.Tolerance(-0.01),
        "schedule": eu.Tolerance(optax.linear_schedule(0.05, -0.05, 20), dual_optimizer=DUAL),
        "as they are": eu.Tolerance(-0.01, dual_optimizer=DUAL, normalize_weights=False),
        "budget": eu.Budget(each(0.2, 0.1), baseline=each(8.0, 10.0)),
        "measured budget": eu.Budget(each(0.2, 0.1)),
    }


def first_multiplier(utilities):
    return 1.0 if utilities == 1 else np.array([0.5, 1.0, 2.0])


def on_noisy_labels(losses_fn, batch):
    """losses_fn of what is added to all labels of the batch, and STEPS of those."""
    noise = 0.3 * np.random.default_rng(1).normal(size=(STEPS, *batch["forget"]["y"].shape))
    noisy = lambda part, noise: part | {"y": part["y"] + noise}
    return lambda params, noise: losses_fn(
        params, {k: noisy(part, noise) for k, part in batch.items()}
    ), noise


def gradient_step(loss_fn, tx):
    """What any trainer does."""

    def step(weighted, state, batch):
        grads = jax.grad(loss_fn)(weighted, batch)
        updates, state = tx.update(grads, state, weighted)
        return optax.apply_updates(weighted, updates), state

    return step


def implicit_step(losses_fn, surgery, tx):
    def step(params, state, batch):
        losses, grads = surgery.value_and_grad(losses_fn)(params, batch, state)
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    return step


def trajectory(step, params, state, batches):
    """The parameters and what `surgery_info` says after each step, by a scan; and the end."""

    def one(carry, batch):
        carry = step(*carry, batch)
        return carry, (carry[0], eu.surgery_info(carry[1]))

    end, seen = jax.jit(lambda *start: jax.lax.scan(one, start, batches))(params, state)
    return seen, end


def both(losses_fn, params, constraint, inner, multiplier, batches):
    """The trajectory of this and that of implicit_surgery."""
    settings = {"initial_multiplier": multiplier}
    tx = eu.saddle_point(inner, constraint, **settings)
    weighted = eu.weighted(params, constraint, **settings)
    ours, _ = trajectory(gradient_step(eu.lagrangian(losses_fn), tx), weighted, tx.init(weighted), batches)
    surgery = eu.implicit_surgery(constraint, **settings)
    tx = optax.chain(surgery, inner)
    theirs, _ = trajectory(implicit_step(losses_fn, surgery, tx), params, tx.init(params), batches)
    return ours, theirs


@pytest.mark.parametrize(
    ("name", "inner", "utilities"),
    slow_unless(
        [
            ("schedule", "clipped momentum", 3),
            ("budget", "clipped momentum", 1),
            ("measured budget", "adamw", 3),
        ],
        one_or_three(list(constraints(1)), list(INNERS)),
    ),
)
def test_equals_implicit_surgery_step_for_step(name, inner, utilities, x64):
    losses_fn, params, batch = problem(utilities)
    losses_fn, noise = on_noisy_labels(losses_fn, batch)
    constraint, multiplier = constraints(utilities)[name], first_multiplier(utilities)
    ours, theirs = both(losses_fn, params, constraint, INNERS[inner], multiplier, noise)
    (weighted, info), (expected, expected_info) = ours, theirs
    chex.assert_trees_all_close((weighted.params, info), (expected, expected_info), rtol=1e-12, atol=1e-12)
    assert np.ptp(info.multiplier, axis=0).min() > 0.1, "each multiplier took part"
    total = 1 + np.sum(info.multiplier.reshape(STEPS, -1), -1) if name != "as they are" else 1.0
    forget = weighted.weights[:, 0]
    assert np.all(np.isclose(forget, 1 / total, rtol=1e-6) | (forget == 0))
    assert np.mean(forget == 0) < 0.9
    assert weighted.weights.shape == (STEPS, 1 + utilities)


def test_forgetting_pauses_where_implicit_surgery_pauses(x64):
    """A forget loss without a floor, whose weight a budget sets to 0 while the retain loss is far above."""
    losses_fn = lambda x, batch: eu.Losses(-jnp.sum(x), 0.5 + jnp.sum(x**2))
    inner, budget = optax.sgd(0.2, momentum=0.9), eu.Budget(0.1, baseline=0.5)
    ours, theirs = both(losses_fn, jnp.zeros(2), budget, inner, 1.0, jnp.arange(STEPS))
    chex.assert_trees_all_close((ours[0].params, ours[1]), theirs, rtol=1e-12, atol=1e-12)
    paused = np.asarray(ours[0].weights[:, 0] == 0)
    assert 0 < paused.sum() < STEPS
    np.testing.assert_allclose(ours[0].weights[paused, 1], 1)


GENTLE = {
    "tolerance": eu.Tolerance(-0.01, dual_optimizer=optax.sgd(1.0)),
    "budget": eu.Budget(0.5, baseline=1.5),
    "measured budget": eu.Budget(0.5),
}


@pytest.mark.parametrize(
    ("name", "utilities", "dtype", "error"),
    slow_unless(
        [("tolerance", 3, jnp.float32, 1e-7), ("budget", 1, jnp.float64, 1e-9)],
        [
            (name, k, *sums)
            for name in GENTLE
            for k in (1, 3)
            for sums in ((jnp.float32, 1e-7), (jnp.float64, 1e-9))
        ],
    ),
)
def test_multisteps_of_micro_batches_is_the_undivided_batch(name, utilities, dtype, error, x64):
    """It sums gradients in float32, if nothing else is said, and here the losses are among them.

    In float64 the multiplier still is a float32. Where rounding tips its last bit, here 2e-10 of 0.003, the
    weights of that step differ as much. Whether it does depends on the compiler.
    """
    large, params, batch = problem(utilities, plain=True)
    losses_fn = lambda params, batch: jax.tree.map(lambda loss: loss / 10, large(params, batch))
    settings = {"initial_multiplier": first_multiplier(utilities)}
    micro = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
    losses = jax.vmap(losses_fn, in_axes=(None, 0))(params, micro)
    assert np.ptp(losses.retain, axis=0).min() > 0.05, "the last micro-batch alone would say something else"

    once = eu.saddle_point(CLIPPED, GENTLE[name], **settings)
    every = optax.MultiSteps(once, 4, accumulator_dtype=dtype).gradient_transformation()
    weighted = eu.weighted(params, GENTLE[name], **settings)
    loss_fn = eu.lagrangian(losses_fn)

    def four(*carry):
        step = gradient_step(loss_fn, every)
        return jax.lax.scan(lambda carry, part: (step(*carry, part), None), carry[:2], micro)[0]

    whole = lambda weighted, state, _: gradient_step(loss_fn, once)(weighted, state, batch)
    divided, _ = trajectory(four, weighted, every.init(weighted), jnp.arange(STEPS))
    undivided, _ = trajectory(whole, weighted, once.init(weighted), jnp.arange(STEPS))
    chex.assert_trees_all_close(divided, undivided, rtol=error, atol=error)
    assert np.ptp(undivided[1].multiplier, axis=0).min() > 0.05


def small():
    """A problem in float32 whose batch is a number, with parameters that are frozen in two ways."""
    losses_fn = lambda params, batch: eu.Losses(
        jnp.sum((params["w"] - 1.0) ** 2) + 0 * params["n"], jnp.sum((params["w"] + batch) ** 2)
    )
    return losses_fn, {"w": jnp.array([0.5, -0.5]), "n": jnp.array(3), "frozen": None}


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), optax.adamw(0.1)])
@pytest.mark.parametrize("constraint", [eu.Tolerance(0.01), eu.Budget(0.3, baseline=1.0)], ids=repr)
def test_integer_and_missing_leaves_stay(constraint, inner):
    losses_fn, params = small()
    tx = eu.saddle_point(inner, constraint)
    weighted = eu.weighted(params, constraint)
    state = tx.init(weighted)
    grads = jax.grad(eu.lagrangian(losses_fn), allow_int=True)(weighted, 1.0)
    updates, state = jax.jit(tx.update)(grads, state, weighted)
    after = optax.apply_updates(weighted, updates)
    assert int(eu.surgery_info(state).skipped_steps) == 0
    assert after.params["frozen"] is None
    assert after.params["n"] == params["n"]
    assert after.params["n"].dtype == params["n"].dtype
    assert not np.array_equal(after.params["w"], params["w"])


def test_the_loss_is_of_plain_means(x64):
    losses_fn, params, batch = problem(3)  # Mean, of unequal counts
    weights = jnp.array([0.1, 0.2, 0.3, 0.4])
    value_and_grad = jax.jit(jax.value_and_grad(eu.lagrangian(losses_fn)))
    value, grads = value_and_grad(eu.Weighted(params, weights), batch)
    losses = losses_fn(params, batch)
    means = [losses.forget.total / losses.forget.count, *(losses.retain.total / losses.retain.count)]
    np.testing.assert_allclose(grads.weights, means, rtol=1e-14)
    np.testing.assert_allclose(value, np.dot(weights, means), rtol=1e-14)
    _, forget, retain = jax.jit(eu.forget_and_retain_grads(losses_fn))(params, batch)
    expected = jax.tree.map(lambda f, r: 0.1 * f + jnp.tensordot(weights[1:], r, 1), forget, retain)
    chex.assert_trees_all_close(grads.params, expected, rtol=1e-12)


BUDGET = eu.Budget(0.3, baseline=1.0)


def quadratic(x, batch):
    return eu.Losses(jnp.sum((x - 1.0) ** 2), jnp.sum((x + batch) ** 2))


def start(constraint=BUDGET, inner=CLIPPED, dtype=jnp.float32):
    tx = eu.saddle_point(inner, constraint)
    weighted = eu.weighted(jnp.array([0.5, -0.5], dtype), constraint)
    return jax.jit(gradient_step(eu.lagrangian(quadratic), tx)), tx, weighted, tx.init(weighted)


BAD_GRADS = {
    "forget loss": lambda grads: grads._replace(weights=grads.weights.at[0].set(jnp.nan)),
    "retain loss": lambda grads: grads._replace(weights=grads.weights.at[1].set(jnp.inf)),
    "gradient": lambda grads: grads._replace(params=grads.params.at[1].set(jnp.nan)),
}


@pytest.mark.parametrize("constraint", [BUDGET, eu.Budget(0.3), eu.Tolerance(-0.1)], ids=repr)
def test_a_bad_step_changes_nothing_but_the_count(constraint):
    step, tx, weighted, state = start(constraint, optax.adamw(0.1))
    for batch in (0.1, 0.4, 0.2):
        weighted, state = step(weighted, state, batch)
    weighted = weighted._replace(weights=weighted.weights + 0.01)  # which a good step would set right
    update = jax.jit(tx.update)
    for bad in BAD_GRADS.values():
        updates, after = update(bad(weighted), state, weighted)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, weighted))
        assert int(eu.surgery_info(after).skipped_steps) == 1
        surgery = after.surgery._replace(skipped_steps=state.surgery.skipped_steps)
        chex.assert_trees_all_equal(after._replace(surgery=surgery), state)
    _, good = update(weighted, state, weighted)
    assert int(good.surgery.applied_steps) == 4


def test_a_bad_micro_batch_is_skipped_by_multisteps():
    tx = eu.saddle_point(CLIPPED, BUDGET)
    ends = []
    for batches in ((0.1, 0.4), (0.1, np.nan, 0.4)):
        every = optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite)
        weighted = eu.weighted(jnp.array([0.5, -0.5]), BUDGET)
        state = every.init(weighted)
        step = jax.jit(gradient_step(eu.lagrangian(quadratic), every))
        for batch in batches:
            weighted, state = step(weighted, state, batch)
        ends.append((weighted, eu.surgery_info(state)))
    chex.assert_trees_all_equal(*ends)
    assert not np.array_equal(ends[0][0].params, [0.5, -0.5])


# What optax asks of a transformation.


WRAPPERS = {
    "chain": lambda tx: optax.chain(tx),
    "named_chain": lambda tx: optax.named_chain(("saddle", tx)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps(1)": lambda tx: optax.MultiSteps(tx, 1),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda total: eu.saddle_point(CLIPPED, eu.Budget(total, baseline=1.0))
    )(total=0.3),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_change_nothing_and_one_program_takes_donated_buffers(wrap):
    step, tx, weighted, state = start()
    wrapped = wrap(tx)
    donating = jax.jit(gradient_step(eu.lagrangian(quadratic), wrapped), donate_argnums=(0, 1))
    carry = jax.tree.map(jnp.copy, (weighted, wrapped.init(weighted)))
    for batch in (0.1, 0.4, 0.2, 0.9):
        weighted, state = step(weighted, state, batch)
        carry = donating(*carry, batch)
    assert donating._cache_size() == 1
    expected = weighted, eu.surgery_info(state)
    chex.assert_trees_all_close((carry[0], eu.surgery_info(carry[1])), expected, rtol=1e-6)
    assert float(eu.multiplier(carry[1])) == pytest.approx(float(eu.multiplier(state)), rel=1e-6)
    assert float(eu.multiplier(state)) != 1.0


@pytest.mark.parametrize("inner", [CLIPPED, optax.adam(0.1)], ids=["momentum", "adam"])
def test_map_params_is_a_no_op_and_init_takes_shapes(inner):
    _, tx, weighted, state = start(inner=inner)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    chex.assert_trees_all_equal(mapped, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, weighted), state)


def test_inner_sees_the_parameters_and_its_extra_arguments():
    seen = []

    def update(updates, state, params=None, *, value=None, **extra_args):
        seen.append((params, value))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    _, tx, weighted, state = start(inner=inner)
    tx.update(weighted, state, weighted, value=3.0, unknown=1)
    assert {value for _, value in seen} == {3.0}
    assert all(params is weighted.params for params, _ in seen)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("dtype", "utilities"),
    slow_unless([("bfloat16", (3,))], [(d, k) for d in ("bfloat16", "float32") for k in ((), (3,))]),
)
def test_arithmetic_is_strict_and_the_dtypes_stay(dtype, utilities):
    def losses_fn(params, batch):
        retain = jnp.sum(params["w"] ** 2).astype(jnp.float32)
        return eu.Losses(jnp.sum(params["w"]), jnp.broadcast_to(retain, utilities) * batch)

    for constraint in (
        eu.Tolerance(jnp.zeros(utilities), dual_optimizer=DUAL),
        eu.Budget(jnp.ones(utilities)),
    ):
        first = {"initial_multiplier": jnp.ones(utilities)}
        tx = eu.saddle_point(optax.sgd(0.1), constraint, **first)
        weighted = eu.weighted({"w": jnp.ones((2, 3), dtype)}, constraint, **first)
        state = tx.init(weighted)
        types = jax.tree.map(jax.typeof, (weighted, state))
        step = jax.jit(gradient_step(eu.lagrangian(losses_fn), tx))
        for _ in range(2):
            weighted, state = step(weighted, state, jnp.float32(2))
        assert jax.tree.map(jax.typeof, (weighted, state)) == types
        assert step._cache_size() == 1
        assert int(eu.surgery_info(state).skipped_steps) == 0


# Precision.


def test_float32_weights_over_bfloat16_parameters_take_small_steps():
    """In bfloat16 the weights would stay at 1/2 whatever the number of these steps."""
    tolerance = eu.Tolerance(0.0, dual_optimizer=optax.sgd(1.0))
    losses_fn = lambda x, batch: eu.Losses(jnp.float32(x) * 0, jnp.float32(batch) + jnp.float32(x) * 0)
    tx = eu.saddle_point(optax.sgd(0.1), tolerance)
    weighted = eu.weighted(jnp.ones([], jnp.bfloat16), tolerance)
    step = gradient_step(eu.lagrangian(losses_fn), tx)
    (seen, info), _ = trajectory(step, weighted, tx.init(weighted), 1e-3 * jnp.arange(101, dtype=jnp.float32))
    assert seen.params.dtype == jnp.bfloat16
    assert seen.weights.dtype == jnp.float32
    np.testing.assert_allclose(info.multiplier[-1], 1.1, rtol=1e-4)
    np.testing.assert_allclose(seen.weights[-1], [1 / 2.1, 1.1 / 2.1], rtol=1e-4)


def test_weights_that_something_moved_come_back():
    """Each update leads from the weights that came in to those of the multiplier, which is in the state."""
    step, _, weighted, state = start(eu.Tolerance(-0.1))
    moved = weighted._replace(weights=weighted.weights + 0.1)
    for batch in (0.1, 0.4, 0.2):
        moved, state = step(moved, state, batch)
        multiplier = eu.multiplier(state)
        np.testing.assert_allclose(moved.weights, np.array([1, multiplier]) / (1 + multiplier), rtol=3e-7)


def test_a_trainers_wider_gradients_are_taken_in_the_dtype_of_the_parameters():
    _, tx, weighted, state = start(dtype=jnp.bfloat16)
    wide = eu.Weighted(jnp.ones(2, jnp.float32), jnp.ones(2))
    updates, after = jax.jit(tx.update)(wide, state, weighted)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, weighted)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


# Checkpoints.


def test_stored_and_restored_as_plain_pytrees():
    step, _, weighted, state = start()
    for batch in (0.1, 0.4, 0.2):
        weighted, state = step(weighted, state, batch)
    stored = flax.serialization.to_bytes((weighted, state))
    empty = jax.tree.map(jnp.zeros_like, (weighted, state))
    restored = jax.tree.map(jnp.asarray, flax.serialization.from_bytes(empty, stored))
    chex.assert_trees_all_equal(step(*restored, 0.7), step(weighted, state, 0.7))


@pytest.mark.slow
def test_stored_and_restored_by_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    step, _, weighted, state = start()
    for batch in (0.1, 0.4, 0.2):
        weighted, state = step(weighted, state, batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", (weighted, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", jax.tree.map(jnp.zeros_like, (weighted, state)))
    chex.assert_trees_all_equal(step(*restored, 0.7), step(weighted, state, 0.7))


# Refusals.


@pytest.mark.parametrize("measure", ["lookahead", "directional"])
@pytest.mark.parametrize("make", [partial(eu.saddle_point, CLIPPED), partial(eu.weighted, jnp.zeros(2))])
def test_measures_of_the_step_and_logarithms_are_refused(make, measure):
    with pytest.raises(ValueError, match=f"measure='{measure}' looks at the step.* leave the measure out"):
        make(eu.Tolerance(0.0, measure=measure))
    with pytest.raises(ValueError, match="not the logarithm of a mean: leave log_losses out"):
        make(eu.Tolerance(0.0, log_losses=True))
    with pytest.raises(TypeError, match="constraint must be"):
        make(0.1)
    with pytest.raises(ValueError, match="initial_multiplier must be > 0"):
        make(BUDGET, initial_multiplier=0.0)


def test_what_is_no_transformation_or_function_is_refused():
    with pytest.raises(TypeError, match=r"inner must be an optax\.GradientTransformation"):
        eu.saddle_point(None, BUDGET)
    with pytest.raises(TypeError, match="losses_fn must be a function"):
        eu.lagrangian(None)


def test_what_is_not_weighted_or_was_cast_or_masked_is_refused():
    _, tx, weighted, state = start()
    with pytest.raises(TypeError, match=r"params of saddle_point\.update must be .*Weighted, got NoneType"):
        tx.update(weighted, state)
    with pytest.raises(TypeError, match=r"grads of saddle_point\.update must be .*weighted\(params"):
        tx.update(weighted.params, state, weighted)
    with pytest.raises(TypeError, match="state must come from the init of saddle_point"):
        tx.update(weighted, state.surgery, weighted)
    with pytest.raises(TypeError, match=r"the loss of lagrangian must be eupmu_jax\.Weighted, got Array"):
        eu.lagrangian(quadratic)(weighted.params, 0.1)
    # A trainer that keeps everything in bfloat16 would read losses of three digits.
    with pytest.raises(TypeError, match=r"weights of grads .* must be float32 or float64, got bfloat16"):
        tx.update(optax.tree.cast(weighted, jnp.bfloat16), state, weighted)
    masked = optax.masked(tx, eu.Weighted(True, False))
    with pytest.raises(TypeError, match="got MaskedNode: cast and mask nothing but params"):
        masked.update(weighted, masked.init(weighted), weighted)


def test_a_multiplier_of_another_shape_is_refused():
    _, tx, weighted, state = start()
    three = eu.weighted(weighted.params, BUDGET, initial_multiplier=jnp.ones(3))
    with pytest.raises(ValueError, match=r"weights of shape \(4,\) do not go with .* of shape \(\)"):
        tx.update(three, state, three)
    with pytest.raises(ValueError, match=r"2 losses, .* weights of shape \(4,\): .* the shape \(\)"):
        eu.lagrangian(quadratic)(three, 0.1)


def test_clipping_in_front_shrinks_the_losses_and_inside_it_does_not():
    """Documented: nothing in a gradient says that it was clipped. `surgery_info` shows it."""
    retain = quadratic(jnp.array([0.5, -0.5]), 0.4).retain
    for wrap, inner, is_seen in (
        (lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx), optax.sgd(0.1), False),
        (lambda tx: tx, optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), True),
    ):
        _, tx, weighted, _ = start(inner=inner)
        tx = wrap(tx)
        _, state = gradient_step(eu.lagrangian(quadratic), tx)(weighted, tx.init(weighted), 0.4)
        assert np.isclose(eu.surgery_info(state).retain_loss, retain) == is_seen
