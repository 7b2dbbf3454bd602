"""Every public transformation against what Optax asks of a transformation, and inside its wrappers."""

import copy
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu
from tests.representatives import slow_unless

TARGET = (jnp.array([1.0, -1.0, 1.0]), jnp.array([[3.0, -2.0], [1.0, 4.0]]))


def losses_fn(params, batch):
    """Two parabolas with one minimum, so that every method ends at TARGET."""
    del batch
    leaves, targets = jax.tree.leaves(params), jax.tree.leaves(TARGET)
    distance = sum(jnp.sum((p - t.astype(p.dtype)) ** 2) for p, t in zip(leaves, targets, strict=False))
    return eu.Losses(distance, 2 * distance)


def start(dtype: Any = jnp.float32):
    return (jnp.array([-1.0, 10.0, 1.0], dtype), jnp.zeros((2, 2), dtype))


class Case(NamedTuple):
    """A transformation of eps, and how a step feeds it: feed(params, state) -> (updates, extra args)."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    static_args: tuple[str, ...]
    feed: Callable[[Any, Any], tuple[Any, dict[str, Any]]]


def feed_eupmu(params, state):
    del state
    return optax.tree.zeros_like(params), {"batch": ()}


def feed_implicit(params, state):
    surgery = eu.implicit_surgery(eu.Tolerance(0.0))
    losses, grads = surgery.value_and_grad(losses_fn)(params, (), state)
    return grads, {"losses": losses}


def feed_explicit(params, state):
    del state
    _, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(params, ())
    return forget_grads, {"retain_grads": retain_grads}


SGD = optax.sgd(1e-2)


def make_eupmu(measure, eps=0.0, initial_multiplier=1.0, dual_optimizer=None, losses_fn=losses_fn, inner=SGD):
    tolerance = eu.Tolerance(eps, measure=measure, dual_optimizer=dual_optimizer)
    return eu.eupmu(losses_fn, inner, tolerance, initial_multiplier=initial_multiplier)


def make_implicit(eps=0.0, initial_multiplier=1.0, dual_optimizer=None):
    tolerance = eu.Tolerance(eps, dual_optimizer=dual_optimizer)
    return eu.implicit_surgery(tolerance, initial_multiplier=initial_multiplier)


def make_explicit(eps=0.0):
    return eu.explicit_surgery(eu.Tolerance(eps))


MEASURES = ("lookahead", "lagged", "directional")
CASES = {measure: Case(partial(make_eupmu, measure), ("losses_fn",), feed_eupmu) for measure in MEASURES} | {
    "implicit": Case(make_implicit, (), feed_implicit),
    "explicit": Case(make_explicit, (), feed_explicit),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
stateful = pytest.mark.parametrize("case", [c for n, c in CASES.items() if n != "explicit"])


def runnable(case: Case, wrap=lambda tx: tx, **kwargs):
    """The transformation, wrapped, and followed by a step down where it only gives a direction."""
    tx = wrap(case.factory(**kwargs))
    return tx if case.feed is feed_eupmu else optax.chain(tx, optax.sgd(1e-2))


def make_step(case: Case, tx):
    @jax.jit
    def step(params, state):
        updates, extra_args = case.feed(params, state)
        updates, state = tx.update(updates, state, params, unknown_extra_arg=1, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


@every_case
def test_ignores_unknown_kwargs_and_compiles_once(case):
    tx = runnable(case)
    step = make_step(case, tx)
    params, state = start(), tx.init(start())
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1


@every_case
def test_map_params_is_a_no_op_and_long_scan_converges(case):
    tx = runnable(case)
    step = make_step(case, tx)
    state = tx.init(start())
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    chex.assert_trees_all_equal(mapped, state)
    (params, _), _ = jax.lax.scan(lambda carry, _: (step(*carry), None), (start(), mapped), length=30_000)
    chex.assert_trees_all_close(params, TARGET, rtol=3e-2, atol=3e-2)


@every_case
def test_inject_hyperparams_changes_nothing(case):
    tx = case.factory(0.1)
    injected = optax.inject_hyperparams(case.factory, static_args=case.static_args)(eps=0.1)
    params = start()
    state, injected_state = jax.jit(tx.init)(params), jax.jit(injected.init)(params)
    for _ in range(3):
        updates, extra_args = case.feed(params, state)
        expected, state = jax.jit(tx.update)(updates, state, params, **extra_args)
        updates, extra_args = case.feed(params, injected_state)
        actual, injected_state = jax.jit(injected.update)(updates, injected_state, params, **extra_args)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5)
        chex.assert_trees_all_close(injected_state.inner_state, state, rtol=1e-5)
    assert float(injected_state.hyperparams["eps"]) == pytest.approx(0.1)


@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_the_dtype_of_params(case, dtype):
    tx = runnable(case)
    params = start(dtype)
    updates, extra_args = case.feed(params, tx.init(params))
    updates, _ = jax.jit(tx.update)(updates, tx.init(params), params, **extra_args)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("measure", MEASURES)
def test_an_inner_that_widens_is_cast_back(measure):
    widen = optax.stateless(lambda updates, params: optax.tree.cast(updates, jnp.float32))
    tx = make_eupmu(measure, inner=optax.chain(widen, optax.sgd(1e-2)))
    params = start(jnp.bfloat16)
    updates, _ = jax.jit(tx.update)(None, tx.init(params), params, batch=())
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@every_case
@pytest.mark.parametrize(
    ("dtype", "loss_dtype"),
    slow_unless(
        [(d, d) for d in ("bfloat16", "float32", "float64")]
        + [("bfloat16", "float32"), ("float32", "float64"), ("float64", "float16")],
        list(product(("float16", "bfloat16", "float32", "float64"), repeat=2)),
    ),
)
def test_state_is_stable_whatever_the_dtypes(case, dtype, loss_dtype, x64):
    def odd_losses(params, batch):
        return eu.Losses(*(loss.astype(loss_dtype) for loss in losses_fn(params, batch)))

    if case.feed is feed_eupmu:
        tx = case.factory(losses_fn=odd_losses)
    else:
        tx = runnable(case)

    @jax.jit
    def step(params, state):
        updates, extra_args = case.feed(params, state)
        if "losses" in extra_args:
            extra_args["losses"] = odd_losses(params, ())
        updates, state = jax.lax.cond(
            jax.random.bernoulli(jax.random.key(0)),
            lambda: tx.update(updates, state, params, **extra_args),
            lambda: (optax.tree.zeros_like(params), state),
        )
        return optax.apply_updates(params, updates), state

    params, state = start(dtype), tx.init(start(dtype))
    types = jax.tree.map(jax.typeof, (params, state))
    for _ in range(2):
        params, state = step(params, state)
    assert jax.tree.map(jax.typeof, (params, state)) == types
    assert step._cache_size() == 1


@stateful
def test_constant_schedule_equals_float(case):
    ends = []
    for tolerance in (0.3, optax.constant_schedule(0.3)):
        tx = runnable(case, eps=tolerance)
        step, carry = make_step(case, tx), (start(), tx.init(start()))
        for _ in range(10):
            carry = step(*carry)
        ends.append(carry)
    chex.assert_trees_all_close(*ends)


@pytest.mark.parametrize("measure", MEASURES)
def test_schedule_is_read_at_the_step_that_it_bounds(measure):
    tolerance = optax.piecewise_constant_schedule(1.0, {2: 10.0})  # 1 for steps 0 and 1, then 10
    tx = eu.eupmu(
        lambda x, batch: eu.Losses(x * 0, x * 0),
        optax.sgd(0.0),
        eu.Tolerance(tolerance, measure=measure),
    )
    x = jnp.array(1.0)
    state, seen = tx.init(x), []
    for _ in range(5):
        _, state = tx.update(None, state, x, batch=())
        seen.append(-float(eu.surgery_info(state).violation))
    assert seen == ([0, 1, 1, 10, 10] if measure == "lagged" else [1, 1, 10, 10, 10])


def test_schedule_counts_applied_steps_only():
    tx = eu.eupmu(
        lambda x, batch: eu.Losses(x * batch, x * 0),
        optax.sgd(0.0),
        eu.Tolerance(lambda step: 1.0 + step, measure="lookahead", dual_optimizer=optax.sgd(0.0)),
    )
    x = jnp.array(1.0)
    state = tx.init(x)
    for batch in (1.0, jnp.nan, 1.0):
        _, state = tx.update(None, state, x, batch=jnp.float32(batch))
    assert float(eu.surgery_info(state).violation) == -2.0


def test_a_transformation_can_be_copied():
    surgery = copy.deepcopy(make_implicit())
    assert callable(surgery.value_and_grad)
    assert float(eu.multiplier(surgery.init(()))) == 1.0


@every_case
def test_mixed_float32_and_float64(case, x64):
    params = (jnp.array([-1.0, 10.0, 1.0], jnp.float32), jnp.zeros((2, 2), jnp.float64))
    tx = runnable(case)
    state = tx.init(params)
    after = make_step(case, tx)(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (params, state))


@every_case
def test_abstract_init_and_explicit_sharding(case):
    tx = case.factory()
    assert tx.init(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)) is not None
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jnp.ones((2, 8, 4), jnp.float16, out_sharding=NamedSharding(mesh, P(None, "x")))
        state = tx.init(params)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, jax.jit(tx.init)(params))
        losses = eu.Losses(jnp.float32(1), jnp.float32(1))
        feeds = {feed_eupmu: {"batch": ()}, feed_implicit: {"losses": losses}}
        extra_args = feeds.get(case.feed, {"retain_grads": params})
        if case.feed is feed_eupmu:
            simple = lambda p, batch: eu.Losses(jnp.sum(p**2), jnp.sum(p))
            tx = case.factory(losses_fn=simple, inner=optax.sgd(1.0, momentum=0.9))
            state = tx.init(params)
        eager = tx.update(params, state, params, **extra_args)
        jitted = jax.jit(tx.update)(params, state, params, **extra_args)
        assert jax.tree.map(jax.typeof, eager[1]) == jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, eager) == jax.tree.map(jax.typeof, jitted)
        chex.assert_trees_all_close(eager, jitted, rtol=1e-3)


@every_case
def test_empty_tree_and_none_leaves(case):
    tx = case.factory()
    one = jnp.float32(1)
    losses = eu.Losses(one, one)
    for params in ({}, {"a": None, "b": jnp.ones(2)}):
        if case.feed is feed_eupmu:
            simple = lambda p, batch: eu.Losses(one, one + sum(jnp.sum(x) for x in jax.tree.leaves(p)))
            tx = case.factory(losses_fn=simple, inner=optax.sgd(0.1, momentum=0.9))
        updates, _ = tx.update(params, tx.init(params), params, batch=(), losses=losses, retain_grads=params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


@every_case
def test_donated_buffers_and_no_alias_of_params(case):
    tx = runnable(case)
    step = jax.jit(make_step(case, tx), donate_argnums=(0, 1))
    params = start()
    state = tx.init(params)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert not pointers & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    for _ in range(2):
        params, state = step(params, state)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params))


@stateful
def test_initial_multiplier_survives_donation(case):
    initial = jnp.array(0.5, jnp.float32)
    keeps_its_params = optax.GradientTransformation(lambda params: params, lambda u, s, p=None: (u, s))
    tx = case.factory(initial_multiplier=initial, dual_optimizer=keeps_its_params)
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(tx.init(start()))
    assert float(initial) == 0.5


# Wrappers.

SAME = {
    "chain": lambda tx: optax.chain(tx),
    "named_chain": lambda tx: optax.named_chain(("surgery", tx)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "partition": lambda tx: optax.partition(
        {"all": tx}, lambda p: jax.tree.map(lambda _: "all", p), mask_compatible_extra_args=True
    ),
    "masked": lambda tx: optax.masked(
        tx, lambda p: jax.tree.map(lambda _: True, p), mask_compatible_extra_args=True
    ),
    "MultiSteps(1)": lambda tx: optax.MultiSteps(tx, 1),
}


@cache
def three_steps(case, wrap=lambda tx: tx):
    tx = wrap(case.factory())
    params, state = start(), tx.init(start())
    step = make_step(case, tx)
    for _ in range(3):
        params, state = step(params, state)
    return params, eu.surgery_info(state) if case.feed is not feed_explicit else ()


@every_case
@pytest.mark.parametrize("wrap", SAME.values(), ids=SAME)
def test_wrappers_that_pass_everything_on_change_nothing(case, wrap):
    chex.assert_trees_all_close(three_steps(case), three_steps(case, wrap), rtol=1e-6)


@every_case
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.contrib.schedule_free(tx, learning_rate=1e-2),
        lambda tx: optax.contrib.mechanize(tx),
    ],
    ids=["schedule_free", "mechanize"],
)
def test_wrappers_that_change_the_iterate_forward_extra_args(case, wrap):
    tx = wrap(runnable(case))
    params, state = start(), tx.init(start())
    step = make_step(case, tx)
    before = losses_fn(params, ()).forget
    for _ in range(20):
        params, state = step(params, state)
    assert losses_fn(params, ()).forget < before
    if case.feed is not feed_explicit:
        assert int(eu.surgery_info(state).skipped_steps) == 0


@stateful
def test_tree_get_and_set_reach_the_multiplier(case):
    tx = runnable(case)
    state = tx.init(start())
    assert float(optax.tree.get(state, "multiplier")) == 1.0
    state = optax.tree.set(state, multiplier=jnp.array(3.0))
    assert float(eu.multiplier(state)) == 3.0
    injected = optax.inject_hyperparams(case.factory, case.static_args)(eps=0.5).init(start())
    assert float(optax.tree.get(injected, "eps")) == 0.5


def test_one_multiplier_outside_a_partition_and_an_error_for_two():
    labels = lambda params: ("a", "b")
    inner = optax.partition({"a": optax.sgd(1e-2), "b": optax.adam(1e-2)}, labels)
    tx = optax.chain(make_implicit(), inner)
    assert float(eu.multiplier(tx.init(start()))) == 1.0
    two = optax.partition({"a": make_implicit(), "b": make_implicit()}, labels)
    with pytest.raises(ValueError, match="exactly one"):
        eu.multiplier(two.init(start()))
    with pytest.raises(ValueError, match="exactly one"):
        eu.surgery_info(optax.sgd(1.0).init(start()))


REFUSING = {
    "lookahead": lambda tx: optax.lookahead(tx, 5, 0.5),
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "line search": lambda tx: optax.chain(tx, optax.scale_by_backtracking_linesearch(5)),
}


@every_case
@pytest.mark.parametrize("wrap", REFUSING.values(), ids=REFUSING)
def test_wrappers_that_refuse_extra_args_raise(case, wrap):
    """Documented: they would drop the batch or the losses, so their TypeError is the right answer."""
    tx = wrap(case.factory())
    synced = optax.LookaheadParams.init_synced(start())
    params = synced if wrap is REFUSING["lookahead"] else start()
    updates, extra_args = case.feed(start(), case.factory().init(start()))
    with pytest.raises(TypeError, match="argument"):
        tx.update(updates, tx.init(params), params, **extra_args)


def test_eupmu_refuses_to_see_a_part_of_params_and_masks_its_inner():
    mask = (True, False)
    outside = optax.masked(make_eupmu("lookahead"), mask)
    with pytest.raises(ValueError, match="inner"):
        outside.update(start(), outside.init(start()), start(), batch=())
    frozen = optax.partition({True: optax.sgd(1e-2), False: optax.set_to_zero()}, mask)
    tx = make_eupmu("lookahead", inner=frozen)
    updates, _ = tx.update(None, tx.init(start()), start(), batch=())
    assert np.any(updates[0])
    assert not np.any(updates[1])


def test_lagged_eupmu_as_the_first_link_equals_eupmu_with_an_inner():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9))
    whole = make_eupmu("lagged", inner=inner)
    chained = optax.chain(make_eupmu("lagged", inner=None), inner)
    ends = []
    for tx in (whole, chained):
        params, state = start(), tx.init(start())
        for _ in range(5):
            updates, state = jax.jit(tx.update)(None, state, params, batch=())
            params = optax.apply_updates(params, updates)
        ends.append((params, eu.surgery_info(state)))
    chex.assert_trees_all_close(*ends, rtol=1e-6)


def test_incoming_updates_are_added_to_the_direction():
    tx = make_eupmu("lagged", inner=None)
    regulariser = jax.tree.map(lambda p: 0.1 * p, start())
    plain, _ = tx.update(None, tx.init(start()), start(), batch=())
    both, _ = tx.update(regulariser, tx.init(start()), start(), batch=())
    chex.assert_trees_all_close(both, jax.tree.map(jnp.add, plain, regulariser), rtol=1e-6)


def test_inner_receives_extra_args():
    seen = []

    def update(updates, state, params=None, *, value=None, **extra_args):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = make_eupmu("lookahead", inner=inner)
    tx.update(None, tx.init(start()), start(), batch=(), value=3.0)
    assert set(seen) == {3.0}


def test_clipping_before_explicit_surgery_clips_the_forget_gradient_only():
    tx = optax.chain(optax.clip_by_global_norm(1.0), make_explicit())
    forget, retain = jnp.array([3.0, 4.0]), jnp.array([-30.0, 0.0])
    updates, _ = tx.update(forget, tx.init(forget), forget, retain_grads=retain)
    chex.assert_trees_all_close(updates, eu.unilateral_projection(forget / 5, retain)[0])


# MultiSteps averages gradients but not losses: pinned, as documented.


@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_multisteps_accumulates_before_it_moves(case, dtype):
    tx = optax.MultiSteps(case.factory(), 4)
    params = start(dtype)
    updates, extra_args = case.feed(params, tx.init(params))
    updates, _ = jax.jit(tx.update)(updates, tx.init(params), params, **extra_args)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))


def test_multisteps_shows_the_last_losses_only():
    tx = optax.MultiSteps(make_implicit(), 2)
    x = jnp.array(1.0)
    state = tx.init(x)
    for retain in (5.0, 7.0):
        losses = eu.Losses(jnp.float32(1), jnp.float32(retain))
        _, state = tx.update(x, state, x, losses=losses)
    assert float(eu.surgery_info(state).retain_loss) == 7.0


def test_multisteps_as_a_plain_transformation_drops_extra_args():
    tx = optax.MultiSteps(make_implicit(), 2).gradient_transformation()
    chained = optax.chain(tx)
    x = jnp.array(1.0)
    with pytest.raises(TypeError, match="losses"):
        chained.update(x, chained.init(x), x, losses=eu.Losses(x, x))
