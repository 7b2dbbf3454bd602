"""One problem on every layout, for the tests; `python tests/parity.py` prints the table of differences."""

import os
import sys
import tempfile
from functools import lru_cache

if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu
from tests import processes
from tests.representatives import one_or_three

STEPS, ROWS, FEATURES, WIDTH = 12, 32, 5, 8
KINDS = ["lookahead", "lagged", "directional", "implicit", "explicit", "lagrangian"]
JIT_LAYOUTS = ["jit", "jit, FSDP", "jit, Explicit axes"]
AXIS_LAYOUTS = ["shard_map", "shard_map, check_vma=False", "pmap"]
LAYOUTS = JIT_LAYOUTS + AXIS_LAYOUTS
PROCESS_LAYOUTS = ["jit", "jit, FSDP", "shard_map"]
PROCESS_CASES = [
    *one_or_three(PROCESS_LAYOUTS, KINDS),
    ("training_step", "lookahead", 3),
    ("training_step, FSDP", "lagged", 1),
]


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


def make_transformation(kind, losses_fn, utilities, axis_name=None):
    """The surgery where it stands alone, else None, and all of the optimiser."""
    initial = jnp.asarray(1.0) if utilities == 1 else jnp.ones(utilities)
    # Log space: a mean of logarithms over the devices would not be the logarithm of the mean.
    measure = "lagged" if kind == "implicit" else kind
    inner = optax.sgd(0.05, momentum=0.9)
    if kind == "explicit":
        return None, optax.chain(eu.explicit_surgery(eu.Tolerance(-0.01)), inner)
    tolerance = eu.Tolerance(-0.01, measure=measure, dual_optimizer=optax.sgd(3.0), log_losses=True)
    if kind == "implicit":
        surgery = eu.implicit_surgery(tolerance, initial_multiplier=initial)
        return surgery, optax.chain(surgery, inner)
    return None, eu.eupmu(losses_fn, inner, tolerance, initial_multiplier=initial, axis_name=axis_name)


def make_step(kind, losses_fn, utilities, axis_name):
    """A step (params, state, batch) -> (params, state), and init."""
    if kind == "lagrangian":
        return make_lagrangian_step(losses_fn, utilities, axis_name)
    surgery, tx = make_transformation(kind, losses_fn, utilities, axis_name)

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


def make_lagrangian_step(losses_fn, utilities, axis_name):
    """As a trainer does it: one loss, the mean of its gradients; the weights travel beside the state."""
    settings = {"initial_multiplier": jnp.asarray(1.0) if utilities == 1 else jnp.ones(utilities)}
    tolerance = eu.Tolerance(-0.01, dual_optimizer=optax.sgd(0.3))
    tx = eu.saddle_point(optax.sgd(0.05, momentum=0.9), tolerance, **settings)

    def of_all_devices(params, batch):
        losses = losses_fn(params, batch)
        return jax.lax.psum(losses, axis_name) if axis_name else losses  # totals and counts

    def step(params, state, batch):
        weights, state = state
        weighted = eu.Weighted(params, weights)
        grads = jax.grad(eu.lagrangian(of_all_devices))(weighted, batch)
        if axis_name:
            grads = jax.lax.pmean(grads, axis_name)
        updates, state = tx.update(grads, state, weighted)
        params, weights = optax.apply_updates(weighted, updates)
        return params, (weights, state)

    def init(params):
        weighted = eu.weighted(params, tolerance, **settings)
        return weighted.weights, tx.init(weighted)

    return step, init


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
    if "FSDP" not in layout:
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


def end_on(layout, kind, utilities):
    losses_fn, params, batch = problem(utilities)
    if "training_step" in layout:
        return end_of_training_step(layout, kind, utilities)
    step, init = make_step(kind, losses_fn, utilities, axis_of(layout))
    return run(on_layout(layout, step), init, placed(layout, params), batch)


def end_of_training_step(layout, kind, utilities):
    """With the package's own step, to which each process gives its own rows as NumPy arrays."""
    losses_fn, params, batch = problem(utilities)
    tx = make_transformation(kind, losses_fn, utilities)[1]
    axes = AxisType.Explicit if "Explicit" in layout else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    step, params, state = eu.training_step(tx, placed(layout, params), mesh)
    rows = ROWS // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    batch = jax.tree.map(lambda leaf: np.asarray(leaf)[mine], batch)
    for _ in range(STEPS):
        params, state, info = step(params, state, batch)
    del info
    return params, state


@lru_cache
def on_one_device(kind, utilities, plain=False):
    losses_fn, params, batch = problem(utilities, plain)
    step, init = make_step(kind, losses_fn, utilities, axis_name=None)
    return run(jax.jit(step), init, params, batch)


def work(index: int, path: str) -> None:
    """What each of two processes does; the first one writes all ends."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicate = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    ends = {}
    for number, (layout, kind, utilities) in enumerate(PROCESS_CASES):
        end = replicate(end_on(layout, kind, utilities))
        for i, leaf in enumerate(jax.tree.leaves(end)):
            ends[f"{number} {i}"] = np.asarray(leaf.addressable_data(0))
    if index == 0:
        np.savez(path, **ends)


def on_two_processes() -> dict[tuple[str, str, int], list[np.ndarray]]:
    """The leaves at the end of every case, from two processes of four devices joined by jax.distributed."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        processes.finish(__file__, file.name)
        ends = dict(np.load(file.name))
    leaves = lambda number: [
        ends[f"{number} {i}"] for i in range(sum(k.split()[0] == str(number) for k in ends))
    ]
    return {case: leaves(number) for number, case in enumerate(PROCESS_CASES)}


def difference(kind, utilities, leaves) -> float:
    """The largest difference from one device, relative to the largest entry of each array."""
    pairs = zip(jax.tree.leaves(on_one_device(kind, utilities)), leaves, strict=True)
    as_floats = lambda leaf: np.asarray(leaf, np.float64)
    return max(
        np.max(np.abs(as_floats(got) - as_floats(one))) / max(np.max(np.abs(as_floats(one))), 1e-300)
        for one, got in pairs
    )


def main() -> None:
    rows = {
        layout: [
            max(difference(kind, k, jax.tree.leaves(end_on(layout, kind, k))) for k in (1, 3))
            for kind in KINDS
        ]
        for layout in LAYOUTS
    }
    ends = on_two_processes()
    rows |= {
        f"{layout}, 2 processes": [
            max(difference(*of[1:], ends[of]) for of in PROCESS_CASES if of[:2] == (layout, kind))
            for kind in KINDS
        ]
        for layout in PROCESS_LAYOUTS
    }
    print("|", " | ".join(["layout", *KINDS]), "|\n|---|", "--:|" * len(KINDS), sep="")
    for layout, values in rows.items():
        print("|", " | ".join([layout, *(f"{value:.0e}" for value in values)]), "|")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        index, (path,) = processes.join()
        work(index, path)
    else:
        main()
