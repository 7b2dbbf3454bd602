"""Every layout gives the one-device answer: float64, SGD with momentum, uneven masks, an empty shard."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu
from tests.costs import AS_USERS
from tests.parity import (
    AXIS_LAYOUTS,
    FEATURES,
    JIT_LAYOUTS,
    KINDS,
    LAYOUTS,
    PROCESS_CASES,
    WIDTH,
    axis_of,
    end_on,
    make_step,
    on_layout,
    on_one_device,
    on_two_processes,
    placed,
    problem,
    run,
)
from tests.representatives import one_or_three, slow_unless

# All kinds where the layouts differ most, and where the code does: with and without tracked axes, K or none.
FAST = [
    *((layout, kind, 3) for layout in ("jit", "jit, FSDP", "shard_map") for kind in KINDS),
    *((layout, kind, 3) for layout in LAYOUTS for kind in ("lookahead", "explicit")),
    *((layout, kind, 1) for layout in ("jit", "shard_map") for kind in ("lagged", "explicit")),
    *((layout, "lagrangian", 3) for layout in ("shard_map, check_vma=False", "pmap")),
]


@pytest.mark.parametrize(
    ("layout", "kind", "utilities"),
    slow_unless(FAST, one_or_three(LAYOUTS, KINDS)),
)
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


@pytest.mark.parametrize(
    ("layout", "kind"),
    slow_unless(
        [("shard_map", "explicit"), ("pmap", "lookahead")],
        [(layout, kind) for layout in AXIS_LAYOUTS for kind in ("lookahead", "explicit")],
    ),
)
def test_plain_means_of_equal_shards(layout, kind, x64):
    losses_fn, params, batch = problem(3, plain=True)
    step, init = make_step(kind, losses_fn, 3, "data")
    ends = on_one_device(kind, 3, plain=True), run(on_layout(layout, step), init, params, batch)
    for one, eight in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_two_processes_give_the_same_answer(x64):
    ends = on_two_processes()
    for case in PROCESS_CASES:
        for one, got in zip(jax.tree.leaves(on_one_device(*case[1:])), ends[case], strict=True):
            np.testing.assert_allclose(got, one, rtol=1e-12, atol=1e-12, err_msg=str(case))


MESHES = ["training_step", "training_step, FSDP", "training_step, Explicit axes"]


@pytest.mark.parametrize(
    ("layout", "kind", "utilities"),
    slow_unless(
        [(mesh, kind, k) for mesh in MESHES for kind, k in [("lookahead", 3), ("lagged", 1)]],
        [(mesh, kind, k) for mesh in MESHES for kind in ("lookahead", "lagged") for k in (1, 3)],
    ),
)
def test_training_step_on_a_mesh(layout, kind, utilities, x64):
    one, end = on_one_device(kind, utilities), end_on(layout, kind, utilities)
    assert ("FSDP" in layout) != end[0]["w"].sharding.is_fully_replicated
    for a, b in zip(*map(jax.tree.leaves, (one, end)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter)(?:-start)?\(")
ARRAY = re.compile(r"f64\[([\d,]*)\]")


def collective_bytes(compiled):
    """Bytes that all collectives of a compiled float64 step put out, on one device."""
    shapes = [shape for out, _ in COLLECTIVE.findall(compiled.as_text()) for shape in ARRAY.findall(out)]
    return sum(8 * math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("layout", JIT_LAYOUTS)
def test_no_more_is_reduced_under_jit_than_by_one_weighted_loss(layout, x64):
    """But for the K scalars, and under FSDP the parameters, that looking ahead or along a tangent takes."""
    losses_fn, params, batch = problem(3)
    params = placed(layout, params)
    inner = optax.sgd(0.05, momentum=0.9)

    def linear(params, state, batch):
        def objective(params):
            forget, retain = (part.total / part.count for part in losses_fn(params, batch))
            return forget + jnp.sum(retain), (forget, retain)

        grads, losses = jax.grad(objective, has_aux=True)(params)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state, losses

    kind = AxisType.Explicit if "Explicit" in layout else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))

    def reduced(step, state):
        with jax.set_mesh(mesh):
            return collective_bytes(
                jax.jit(step).lower(params, state, batch).compile(compiler_options=AS_USERS)
            )

    plain = reduced(linear, inner.init(params))
    assert plain >= 8 * (FEATURES + 1) * WIDTH, "the gradient"
    # The sum of each sharded leaf of the gradient, which is not finite where the leaf is not.
    checked = ("FSDP" in layout) * 8 * len(params)
    once_more = 8 * 3 + ("FSDP" in layout) * 8 * (FEATURES + 1) * WIDTH
    for kind, more in [("lagged", 0), ("implicit", 0), ("lookahead", once_more), ("directional", once_more)]:
        step, init = make_step(kind, losses_fn, 3, None)
        assert reduced(step, init(params)) <= plain + more + checked, kind


@pytest.mark.parametrize(
    ("layout", "kind"),
    slow_unless(
        [
            *(("shard_map", kind) for kind in ("lookahead", "lagged", "explicit")),
            ("shard_map, check_vma=False", "lookahead"),
        ],
        # Those of the Lagrangian are the trainer's.
        [(layout, kind) for layout in AXIS_LAYOUTS[:2] for kind in KINDS if kind != "lagrangian"],
    ),
)
def test_collectives_of_the_compiled_step(layout, kind, x64):
    """One reduction of the gradient and one of the losses; one more where R is looked at again."""
    losses_fn, params, batch = problem(3)
    step, init = make_step(kind, losses_fn, 3, "data")
    lowered = on_layout(layout, step).lower(params, init(params), batch)
    collectives = COLLECTIVE.findall(lowered.compile(compiler_options=AS_USERS).as_text())
    assert {name for _, name in collectives} == {"all-reduce"}
    of_gradient = [shape for shape, _ in collectives if f"{FEATURES},{WIDTH}]" in shape]
    assert len(of_gradient) == 1
    assert len(collectives) - 1 == (2 if kind in ("lookahead", "directional") else 1)


@pytest.mark.parametrize("checked", [True, False])
def test_losses_that_are_already_averaged_over_the_axis(checked, x64):
    """A losses_fn with its own pmean gives the same gradient, not an N-th of it."""
    losses_fn, params, batch = problem(1)
    averaged = lambda p, b: jax.tree.map(partial(jax.lax.pmean, axis_name="data"), losses_fn(p, b))
    surgery = eu.implicit_surgery(eu.Tolerance(0.0))
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

    def step(params, batch, axis_name=None):
        return eu.forget_and_retain_grads(losses_fn, axis_name)(params, batch)[0].forget[None]

    with pytest.raises(ValueError, match=r"axis data .*pass axis_name"):
        jax.shard_map(step, **specs)(params, batch)
    # Untracked, a missing reduction cannot be told from a model for each device: that must be said.
    with pytest.raises(ValueError, match=r"over data it cannot be seen .*axis_name=\(\)"):
        jax.shard_map(step, **specs, check_vma=False)(params, batch)
    with pytest.raises(ValueError, match=r"over data it cannot be seen .*axis_name=\(\)"):
        jax.pmap(step, axis_name="data", in_axes=(None, 0))(
            params, jax.tree.map(lambda x: x[:8, None], batch)
        )
    own = lambda params, batch: step(jax.tree.map(lambda leaf: leaf[0], params), batch)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + i) for i in range(8)]), params)
    losses = jax.jit(jax.shard_map(own, **specs | {"in_specs": P("data")}))(many, batch)
    said = lambda params, batch: step(jax.tree.map(lambda leaf: leaf[0], params), batch, axis_name=())
    unchecked = jax.shard_map(said, **specs | {"in_specs": P("data")}, check_vma=False)
    np.testing.assert_allclose(jax.jit(unchecked)(many, batch), losses, rtol=1e-12)
    for i in range(8):
        part = jax.tree.map(lambda leaf, i=i: leaf[4 * i : 4 * i + 4], batch)
        model = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        np.testing.assert_allclose(losses[i], losses_fn(model, part).forget, rtol=1e-12)
