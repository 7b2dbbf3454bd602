"""axis_name inside shard_map and pmap, and jit on sharded data: the one-device answer, in float64."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu

STEPS, ROWS, FEATURES = 12, 32, 5
LAYOUTS = ["jit-sharded", "shard_map", "shard_map-unchecked", "pmap"]


def problem(utilities):
    rng = np.random.default_rng(0)
    batch = {
        name: (jnp.asarray(rng.normal(size=(ROWS, FEATURES))), jnp.asarray(rng.normal(size=ROWS)))
        for name in ("forget", *map(str, range(utilities)))
    }
    params = {"w": jnp.asarray(rng.normal(size=FEATURES)), "b": jnp.asarray(0.3)}

    def losses_fn(params, batch):
        def loss(part):
            x, y = part
            return 0.5 + jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)

        retain = [loss(batch[str(k)]) for k in range(utilities)]
        return eu.Losses(loss(batch["forget"]), retain[0] if utilities == 1 else jnp.stack(retain))

    return losses_fn, params, batch


def make_step(kind, losses_fn, utilities, axis_name):
    """A step (params, state, batch) -> (params, state), and init."""
    initial = jnp.asarray(1.0) if utilities == 1 else jnp.ones(utilities)
    # Log space: a mean of logarithms over the devices would not be the logarithm of the mean.
    settings = {"tolerance": -0.01, "initial_multiplier": initial, "log_losses": True}
    settings |= {"dual_optimizer": optax.sgd(3.0)}
    inner = optax.sgd(0.05, momentum=0.9)
    if kind == "implicit":
        surgery = eu.implicit_surgery(**settings)
        tx = optax.chain(surgery, inner)
    elif kind == "explicit":
        tx = optax.chain(eu.explicit_surgery(tolerance=-0.01), inner)
    else:
        tx = eu.eupmu(losses_fn, inner, measure=kind, axis_name=axis_name, **settings)

    def step(params, state, batch):
        grads, extra_args = None, {"batch": batch}
        if kind == "implicit":
            value_and_grad = surgery.value_and_grad(losses_fn, axis_name=axis_name)
            losses, grads = value_and_grad(params, batch, state)
            extra_args = {"losses": losses}
        elif kind == "explicit":
            both = eu.forget_and_retain_grads(losses_fn, axis_name=axis_name)
            _, grads, retain_grads = both(params, batch)
            extra_args = {"retain_grads": retain_grads}
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step, tx.init


def on_layout(layout, step):
    """`step` on eight devices, with the batch's rows split among them."""
    if layout == "pmap":
        split = lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:])
        mapped = jax.pmap(step, axis_name="data", in_axes=(None, None, 0))

        def run(params, state, batch):
            out = mapped(params, state, jax.tree.map(split, batch))
            for leaf in jax.tree.leaves(out):
                np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))
            return jax.tree.map(lambda leaf: leaf[0], out)

        return run
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    if layout == "jit-sharded":
        place = lambda batch: jax.device_put(batch, NamedSharding(mesh, P("data")))
        jitted = jax.jit(step)
        return lambda params, state, batch: jitted(params, state, place(batch))
    checked = layout == "shard_map"
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": checked}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs))


def run(step, init, params, batch):
    carry = (params, init(params))
    for _ in range(STEPS):
        carry = step(*carry, batch)
    return carry


@lru_cache
def on_one_device(kind, utilities):
    losses_fn, params, batch = problem(utilities)
    step, init = make_step(kind, losses_fn, utilities, axis_name=None)
    return run(jax.jit(step), init, params, batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["lookahead", "lagged", "directional", "implicit", "explicit"])
@pytest.mark.parametrize("utilities", [1, 3])
def test_same_answer_on_eight_devices(layout, kind, utilities, x64):
    losses_fn, params, batch = problem(utilities)
    axis_name = None if layout == "jit-sharded" else "data"
    step, init = make_step(kind, losses_fn, utilities, axis_name)
    ends = on_one_device(kind, utilities), run(on_layout(layout, step), init, params, batch)
    for one, eight in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-12, atol=1e-12)
    if kind != "explicit":
        assert not np.allclose(eu.multiplier(ends[0][1]), 1.0), "the multiplier took part"


@pytest.mark.parametrize("checked", [True, False])
def test_losses_that_are_already_averaged_over_the_axis(checked, x64):
    """A losses_fn with its own pmean gives the same gradient, not an N-th of it."""
    losses_fn, params, batch = problem(1)
    averaged = lambda p, b: jax.tree.map(partial(jax.lax.pmean, axis_name="data"), losses_fn(p, b))
    surgery = eu.implicit_surgery()
    state = surgery.init(params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def grads(params, state, batch):
        return surgery.value_and_grad(averaged, axis_name="data")(params, batch, state)

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": checked}
    sharded = jax.jit(jax.shard_map(grads, mesh=mesh, **specs))(params, state, batch)
    single = surgery.value_and_grad(losses_fn)(params, batch, state)
    for one, eight in zip(*map(jax.tree.leaves, (single, sharded)), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-12, atol=1e-12)


def test_a_fault_on_one_shard_skips_the_step_on_all(x64):
    losses_fn, params, batch = problem(1)
    broken = batch | {"forget": (batch["forget"][0].at[3].set(jnp.nan), batch["forget"][1])}
    for layout in LAYOUTS:
        axis_name = None if layout == "jit-sharded" else "data"
        step, init = make_step("lookahead", losses_fn, 1, axis_name)
        after, state = on_layout(layout, step)(params, init(params), broken)
        assert int(eu.surgery_info(state).skipped_steps) == 1
        np.testing.assert_array_equal(after["w"], params["w"])
