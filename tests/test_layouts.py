"""Every layout gives the one-device answer: float64, SGD with momentum, uneven masks, an empty shard."""

import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu

STEPS, ROWS, FEATURES, WIDTH = 12, 32, 5, 8
KINDS = ["lookahead", "lagged", "directional", "implicit", "explicit"]
JIT_LAYOUTS = ["jit", "jit, FSDP", "jit, Explicit axes"]
AXIS_LAYOUTS = ["shard_map", "shard_map unchecked", "pmap"]
LAYOUTS = JIT_LAYOUTS + AXIS_LAYOUTS


def problem(utilities, plain=False):
    """Masked losses of unequal counts, each with one empty shard of eight; or plain means of all rows."""
    rng = np.random.default_rng(0)
    names = ("forget", *map(str, range(utilities)))
    batch = {
        name: {
            "x": jnp.asarray(rng.normal(size=(ROWS, FEATURES))),
            "y": jnp.asarray(rng.normal(size=ROWS)),
            "mask": jnp.asarray(rng.uniform(size=ROWS) < 0.6).at[4 * i : 4 * i + 4].set(False),
        }
        for i, name in enumerate(names)
    }
    params = {"w": jnp.asarray(rng.normal(size=(FEATURES, WIDTH))), "v": jnp.asarray(rng.normal(size=WIDTH))}

    def losses_fn(params, batch):
        def mean(part):
            errors = 0.5 + (jnp.tanh(part["x"] @ params["w"]) @ params["v"] - part["y"]) ** 2
            if plain:
                return jnp.mean(errors)
            return eu.Mean(jnp.sum(part["mask"] * errors), jnp.sum(part["mask"]))

        forget, *retain = (mean(batch[name]) for name in names)
        if utilities == 1:
            return eu.Losses(forget, retain[0])
        return eu.Losses(forget, jax.tree.map(lambda *parts: jnp.stack(parts), *retain))

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
    kind = AxisType.Explicit if "Explicit" in layout else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    if layout in JIT_LAYOUTS:
        jitted = jax.jit(step)

        def run_jit(params, state, batch):
            with jax.set_mesh(mesh):
                return jitted(params, state, jax.device_put(batch, NamedSharding(mesh, P("data"))))

        return run_jit
    checked = layout == "shard_map"
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": checked}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs))


def placed(layout, params):
    """The parameters as they are on that layout: the last axis over the devices under FSDP."""
    if layout != "jit, FSDP":
        return params
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    last = lambda leaf: NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "data"))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, last(leaf)), params)


def axis_of(layout):
    return "data" if layout in AXIS_LAYOUTS else None


def run(step, init, params, batch):
    carry = (params, init(params))
    for _ in range(STEPS):
        carry = step(*carry, batch)
    return carry


@lru_cache
def on_one_device(kind, utilities, plain=False):
    losses_fn, params, batch = problem(utilities, plain)
    step, init = make_step(kind, losses_fn, utilities, axis_name=None)
    return run(jax.jit(step), init, params, batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("utilities", [1, 3])
def test_same_answer_on_eight_devices(layout, kind, utilities, x64):
    losses_fn, params, batch = problem(utilities)
    step, init = make_step(kind, losses_fn, utilities, axis_of(layout))
    ends = on_one_device(kind, utilities), run(on_layout(layout, step), init, placed(layout, params), batch)
    if layout == "jit, FSDP":
        assert all(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(ends[1][0]))
    for one, eight in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-12, atol=1e-12)
    if kind != "explicit":
        assert not np.allclose(eu.multiplier(ends[0][1]), 1.0), "the multiplier took part"


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_is_its_total_by_its_count(kind, x64):
    """On one device, a count of K and one that depends on the parameters included."""
    losses_fn, params, batch = problem(3)

    def divided(params, batch):
        losses = losses_fn(params, batch)
        return eu.Losses(*(part.total / jax.lax.stop_gradient(part.count) for part in losses))

    def moving(params, batch):
        factor = jnp.sum(params["v"] ** 2)
        fixed = jax.lax.stop_gradient(factor)
        return eu.Losses(
            *(eu.Mean(part.total * fixed, part.count * factor) for part in losses_fn(params, batch))
        )

    ends = []
    for fn in (divided, losses_fn, moving):
        step, init = make_step(kind, fn, 3, axis_name=None)
        ends.append(run(jax.jit(step), init, params, batch))
    for end in ends[1:]:
        for one, same in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(end), strict=True):
            np.testing.assert_allclose(same, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", AXIS_LAYOUTS)
@pytest.mark.parametrize("kind", ["lookahead", "explicit"])
def test_plain_means_of_equal_shards(layout, kind, x64):
    losses_fn, params, batch = problem(3, plain=True)
    step, init = make_step(kind, losses_fn, 3, "data")
    ends = on_one_device(kind, 3, plain=True), run(on_layout(layout, step), init, params, batch)
    for one, eight in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["shard_map", "shard_map unchecked"])
@pytest.mark.parametrize("kind", KINDS)
def test_collectives_of_the_compiled_step(layout, kind, x64):
    """One reduction of the gradient and one of the losses; one more where R is looked at again."""
    losses_fn, params, batch = problem(3)
    step, init = make_step(kind, losses_fn, 3, "data")
    compiled = on_layout(layout, step).lower(params, init(params), batch).compile().as_text()
    collectives = re.findall(
        r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter)(?:-start)?\(", compiled
    )
    assert {name for _, name in collectives} == {"all-reduce"}
    of_gradient = [shape for shape, _ in collectives if f"{FEATURES},{WIDTH}]" in shape]
    assert len(of_gradient) == 1
    assert len(collectives) - 1 == (2 if kind in ("lookahead", "directional") else 1)


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
    broken = batch | {"forget": batch["forget"] | {"y": batch["forget"]["y"].at[3].set(jnp.nan)}}
    for layout in LAYOUTS:
        step, init = make_step("lookahead", losses_fn, 1, axis_of(layout))
        after, state = on_layout(layout, step)(params, init(params), broken)
        assert int(eu.surgery_info(state).skipped_steps) == 1
        np.testing.assert_array_equal(after["w"], params["w"])


def test_losses_that_differ_between_devices_need_axis_name(x64):
    """Where it can be seen; a model of its own on each device is left alone."""
    losses_fn, params, batch = problem(1, plain=True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P("data")}
    step = lambda params, batch: eu.forget_and_retain_grads(losses_fn)(params, batch)[0].forget[None]
    with pytest.raises(ValueError, match=r"axis data .*pass axis_name"):
        jax.shard_map(step, **specs)(params, batch)
    own = lambda params, batch: step(jax.tree.map(lambda leaf: leaf[0], params), batch)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + i) for i in range(8)]), params)
    losses = jax.jit(jax.shard_map(own, **specs | {"in_specs": P("data")}))(many, batch)
    for i in range(8):
        part = jax.tree.map(lambda leaf, i=i: leaf[4 * i : 4 * i + 4], batch)
        model = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        np.testing.assert_allclose(losses[i], losses_fn(model, part).forget, rtol=1e-12)
