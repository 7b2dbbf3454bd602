"""The compiled step and accumulation: one program, nobody else's buffers, clear errors, exact sums."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu
from eupmu_jax.flax import TrainState
from tests.costs import cost, count, eupmu_step, mlp
from tests.parity import KINDS, STEPS, make_step, problem, run
from tests.representatives import slow_unless


def mesh_of(*shape, names=("data", "model")):
    return jax.make_mesh(shape, names[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def losses_fn(params, batch):
    noise = 0.0 if "key" not in batch else jax.random.normal(batch["key"], batch["x"].shape)
    predicted = batch["x"] * params["w"] + noise
    return eu.Losses(jnp.mean((predicted - 1) ** 2), jnp.mean((predicted + 1) ** 2))


TOLERANCE = eu.Tolerance(0.0, measure="lookahead")
TX = eu.eupmu(losses_fn, optax.adam(0.1), TOLERANCE)
PARAMS = {"w": jnp.array([1.0, 2.0])}


@pytest.mark.parametrize("mesh", [None, mesh_of(8), mesh_of(2, 4)], ids=["one device", "8", "2 x 4"])
def test_one_program_that_leaves_the_callers_arrays_alone(mesh):
    traced, traces = [], []

    def counted(params, batch):
        traced.append(None)
        return losses_fn(params, batch)

    step, params, state = eu.training_step(eu.eupmu(counted, optax.adam(0.1), TOLERANCE), PARAMS, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    rng = np.random.default_rng(0)
    for i in range(4):
        x = rng.normal(size=(16, 2)).astype(np.float32)
        batch = {"x": x if i % 2 else jnp.asarray(x), "key": jax.random.key(i)}
        params, state, info = step(params, state, batch)
        traces.append(len(traced))
    assert traces == traces[:1] * 4
    assert int(info.skipped_steps) == 0
    assert jax.tree.map(lambda leaf: leaf.sharding, (params, state)) == placed
    np.testing.assert_array_equal(PARAMS["w"], [1.0, 2.0])


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adam(0.1)])
def test_committed_parameters_start_where_the_step_ends(inner):
    """Else the second step would be compiled anew."""
    params = jax.device_put(PARAMS, jax.devices()[1])
    step, *at = eu.training_step(eu.eupmu(losses_fn, inner, TOLERANCE), params)
    committed = lambda tree: jax.tree.map(lambda leaf: (leaf.committed, leaf.sharding), tree)
    before = committed(at)
    *after, _ = step(*at, {"x": np.ones((4, 2), np.float32), "key": jax.random.key(0)})
    assert committed(after) == before
    state = TrainState.create(apply_fn=None, params=params, tx=inner)
    assert all(leaf.committed for leaf in jax.tree.leaves((state.step, state.opt_state)))


def test_a_spec_for_each_part_of_the_batch():
    specs = {"x": P("model", "data"), "key": P()}
    step, params, state = eu.training_step(TX, PARAMS, mesh_of(2, 4), batch_spec=specs)
    x = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    batch = {"x": x, "key": jax.random.key(0)}
    lowered = step(params, state, batch)
    alone, params, state = eu.training_step(TX, PARAMS)
    np.testing.assert_allclose(lowered[0]["w"], alone(params, state, batch)[0]["w"], rtol=1e-6)


def test_extra_arguments_reach_the_inner_optimiser():
    scale = lambda updates, state, params=None, *, factor, **extra: (
        jax.tree.map(lambda u: u * factor, updates),
        state,
    )
    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, scale)
    for mesh in (None, mesh_of(8)):
        step, params, state = eu.training_step(eu.eupmu(losses_fn, inner, TOLERANCE), PARAMS, mesh)
        after, _, _ = step(params, state, {"x": np.ones((8, 2), np.float32)}, factor=0.0)
        np.testing.assert_array_equal(after["w"], PARAMS["w"])


def test_errors_name_what_to_do():
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh or None, got tuple"):
        eu.training_step(TX, PARAMS, (8,))
    with pytest.raises(TypeError, match=r"tx must be an optax\.GradientTransformation"):
        eu.training_step(losses_fn, PARAMS)
    for mesh in (None, mesh_of(8)):
        with pytest.raises(ValueError, match="found 0"):
            eu.training_step(optax.sgd(0.1), PARAMS, mesh)
    step, params, state = eu.training_step(TX, PARAMS, mesh_of(8))
    with pytest.raises(ValueError, match=r"batch\['x'\] of shape \(12, 2\) cannot be split .* pad it"):
        step(params, state, {"x": np.ones((12, 2), np.float32)})
    step(params, state, {"x": np.ones((16, 2), np.float32)})  # nothing was lost by that


# Accumulation.


def micro_batches(batch, amount=4):
    return jax.tree.map(lambda leaf: leaf.reshape(amount, -1, *leaf.shape[1:]), batch)


def sparse_problem(utilities=3):
    """With a forget set of which the first micro-batch has nothing."""
    losses_fn, params, batch = problem(utilities)
    batch["forget"]["mask"] = batch["forget"]["mask"].at[:8].set(False)
    return losses_fn, params, batch


@cache
def in_one_batch(kind):
    losses_fn, params, batch = sparse_problem()
    step, init = make_step(kind, losses_fn, 3, None)
    return run(jax.jit(step), init, params, batch)


ACCUMULATING = ["one device", "jit", "shard_map", "shard_map, check_vma=False"]


@pytest.mark.parametrize(
    ("layout", "kind"),
    slow_unless(
        [
            *(("one device", kind) for kind in KINDS),
            *(("shard_map", kind) for kind in ("lookahead", "lagged", "explicit")),
            ("jit", "lagged"),
            ("shard_map, check_vma=False", "lookahead"),
        ],
        [(layout, kind) for layout in ACCUMULATING for kind in KINDS],
    ),
)
def test_accumulated_is_the_one_batch_step(layout, kind, x64):
    """Log-space weights, uneven masks, one micro-batch and one shard with nothing in it; three utilities."""
    losses_fn, params, batch = sparse_problem()
    axis_name = "data" if "shard_map" in layout else None
    step, init = make_step(kind, eu.accumulated(losses_fn), 3, axis_name)
    step = jax.jit(step)
    mesh = mesh_of(8)
    split = micro_batches(batch)
    if axis_name:
        specs = {
            "in_specs": (P(), P(), P(None, "data")),
            "out_specs": P(),
            "check_vma": layout == "shard_map",
        }
        step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    elif layout == "jit":
        split = jax.device_put(split, NamedSharding(mesh, P(None, "data")))
    ends = in_one_batch(kind), run(step, init, params, split)
    for one, accumulated in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(accumulated, one, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["lagged", pytest.param("lookahead", marks=pytest.mark.slow)])
def test_what_accumulation_costs(measure):
    """One forward pass more, and the residuals of one micro-batch."""
    params, losses_fn, batch = mlp(batch_size=2048)
    products = {}
    memory = {}
    for name, fn, one in [
        ("whole", losses_fn, batch),
        ("accumulated", eu.accumulated(losses_fn), micro_batches(batch, 8)),
        ("micro", losses_fn, jax.tree.map(lambda leaf: leaf[:256], batch)),
    ]:
        tx = eu.eupmu(fn, optax.sgd(0.1, momentum=0.9), eu.Tolerance(0.0, measure=measure))
        args = (params, tx.init(params), one)
        products[name] = count(jax.make_jaxpr(eupmu_step(tx))(*args).jaxpr, "dot_general")
        memory[name] = cost(eupmu_step(tx), *args)[1]
    forward = 2 * len(params)
    assert products["accumulated"] == products["whole"] + forward
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # XLA's loop holds the sum of the gradient before and after an iteration, and what it adds.
    assert memory["accumulated"] <= memory["micro"] + 3 * weights
    assert memory["accumulated"] <= memory["whole"] / 2


def test_the_gradient_is_summed_wider_than_bfloat16():
    """256 contributions of about the same size: a bfloat16 sum would lose all but the first 8 bits."""
    x = jnp.ones((256, 1)) + 2.0**-7 * jnp.arange(256.0)[:, None] % 0.25
    fn = lambda w, micro: eu.Losses(jnp.mean(w.astype(jnp.float32) * micro), jnp.mean(w.astype(jnp.float32)))
    _, got, _ = eu.forget_and_retain_grads(eu.accumulated(fn))(jnp.ones([], jnp.bfloat16), x)
    assert got == jnp.mean(x).astype(jnp.bfloat16)


def test_integers_reach_accumulated_losses_as_they_are():
    large = 2**31 - 5  # which float32 would round
    fn = lambda p, micro: eu.Losses(p["w"] * (p["n"] == large), p["w"] + micro.sum())
    losses = eu.accumulated(fn)({"w": jnp.array(3.0), "n": jnp.array(large)}, jnp.zeros((2, 1)))
    assert losses.forget.total / losses.forget.count == 3


@pytest.mark.parametrize("batch", [{}, {"a": jnp.ones(())}, {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}])
def test_what_cannot_be_accumulated(batch):
    fn = eu.accumulated(lambda params, batch: eu.Losses(params["w"][0], params["w"][1]))
    with pytest.raises(ValueError, match="leading axis of the same number of micro-batches"):
        fn(PARAMS, batch)


# Mixed precision.


@pytest.mark.parametrize("kind", slow_unless(["lookahead", "lagged", "explicit"], KINDS))
def test_bfloat16_parameters_follow_float32(kind):
    """Parameters and activations in bfloat16; losses, multiplier and reductions in float32."""
    ends = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        losses_fn, params, batch = problem(3)
        cast = lambda leaf, dtype=dtype: (
            leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        )
        params, batch = jax.tree.map(cast, (params, batch))

        def in_float32(params, batch, losses_fn=losses_fn):
            return jax.tree.map(lambda value: value.astype(jnp.float32), losses_fn(params, batch))

        step, init = make_step(kind, in_float32, 3, None)
        params, state = run(jax.jit(step), init, params, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        ends[dtype] = (in_float32(params, batch), None if kind == "explicit" else eu.surgery_info(state))
    (exact, info), (rounded, rounded_info) = ends.values()
    for one, other in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True):
        np.testing.assert_allclose(other, one, rtol=0.05)
    if info:
        assert rounded_info.multiplier.dtype == jnp.float32
        assert int(rounded_info.skipped_steps) == 0
        np.testing.assert_allclose(rounded_info.multiplier, info.multiplier, rtol=0.05)
        assert not np.allclose(info.multiplier, 1.0, rtol=0.05), f"{STEPS} steps moved it"


def test_a_float32_multiplier_over_bfloat16_takes_small_steps():
    """A multiplier in bfloat16 would stay at 1 whatever the number of these steps."""
    tx = eu.eupmu(
        lambda w, batch: eu.Losses(jnp.float32(w) * 0, jnp.float32(batch) + jnp.float32(w) * 0),
        optax.sgd(0.1),
        eu.Tolerance(0.0, dual_optimizer=optax.sgd(1.0)),
    )
    w = jnp.ones([], jnp.bfloat16)
    state = tx.init(w)
    step = jax.jit(lambda state, batch: tx.update(None, state, w, batch=batch)[1])
    for i in range(101):
        state = step(state, jnp.float32(i * 1e-3))
    np.testing.assert_allclose(eu.multiplier(state), 1.1, rtol=1e-4)
