"""What is trained and what is frozen: adapters over a base, and how many copies there are of either."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import eupmu_jax as eu
from eupmu_jax.flax import trainable

RNG = np.random.default_rng(0)
FORGET, RETAIN = RNG.normal(size=(40, 64)).astype(np.float32), RNG.normal(size=(100, 64)).astype(np.float32)
BUDGET = eu.Budget(0.1)
SHAPE = (64, 65)


def adapted():
    """A base that no other array of this process has the shape of, and an adapter of rank 2."""
    return {
        "base": {"kernel": jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)},
        "lora": {"a": jnp.asarray(RNG.normal(size=(64, 2)), jnp.float32), "b": jnp.zeros((2, 65))},
    }


def losses_fn(params, batch):
    kernel = params["base"]["kernel"] + params["lora"]["a"] @ params["lora"]["b"]
    loss = lambda x, target: jnp.mean((x @ kernel - target) ** 2) / 64
    return eu.Losses(loss(batch["forget"], 1.0), loss(batch["retain"], 0.0))


def is_adapter(path):
    return path.startswith("lora.")


def unlearned(params, **settings):
    settings = {"steps": 12, "batch_size": 8, "trainable": is_adapter} | settings
    inner = settings.pop("inner", optax.adam(1e-3))
    return eu.unlearn(losses_fn, params, FORGET, RETAIN, inner, BUDGET, **settings)


def test_the_trained_leaves_move_and_the_others_are_the_same_arrays():
    params = adapted()
    got, _ = unlearned(params)
    assert got["base"]["kernel"] is params["base"]["kernel"]
    assert not np.array_equal(got["lora"]["b"], params["lora"]["b"])
    closed_over, _ = eu.unlearn(
        lambda lora, batch: losses_fn(params | {"lora": lora}, batch),
        params["lora"],
        FORGET,
        RETAIN,
        optax.adam(1e-3),
        BUDGET,
        steps=12,
        batch_size=8,
    )
    for a, b in zip(*map(jax.tree.leaves, (closed_over, got["lora"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_base_is_not_a_constant_of_the_program():
    """Closed over, it would be compiled in: another copy, and a program for each base."""
    params, seen = adapted(), []

    def fn(params, batch):
        seen.append(isinstance(params["base"]["kernel"], jax.core.Tracer))
        return losses_fn(params, batch)

    few = {"steps": 2, "batch_size": 8}
    eu.unlearn(fn, params, FORGET, RETAIN, optax.sgd(0.1), BUDGET, trainable=is_adapter, **few)
    assert all(seen)


def copies(shape):
    gc.collect()
    return sum(array.shape == shape for array in jax.live_arrays())


@pytest.mark.parametrize("scored", [False, True], ids=["last", "best"])
def test_copies_in_memory(scored):
    """One of the base; of what is trained the caller's, the run's, Adam's two, and with a score the best."""
    params, counted, before = adapted(), [], copies(SHAPE)
    trained_before = copies((64, 2))
    unlearned(
        params,
        every=4,
        score=(lambda metrics: metrics["step"]) if scored else None,
        callbacks=[lambda params, metrics: counted.append((copies(SHAPE), copies((64, 2))))],
    )
    assert {base - before for base, _ in counted} == {0}
    assert {trained - trained_before for _, trained in counted} == {3 + scored}


def test_copies_of_a_whole_model():
    params = {"base": adapted()["base"]["kernel"]}
    before, counted = copies(SHAPE), []

    def fn(params, batch):
        loss = lambda x, target: jnp.mean((x @ params["base"] - target) ** 2) / 64
        return eu.Losses(loss(batch["forget"], 1.0), loss(batch["retain"], 0.0))

    watch = lambda params, metrics: counted.append(copies(SHAPE) - before)
    eu.unlearn(
        fn, params, FORGET, RETAIN, optax.sgd(0.1), BUDGET, steps=12, every=3, batch_size=8, callbacks=[watch]
    )
    assert set(counted) == {1}


def test_a_folder_holds_the_adapter_and_the_checksum_of_the_base(tmp_path):
    from safetensors.numpy import load_file

    params = adapted()
    got, _ = unlearned(params, folder=tmp_path)
    saved = load_file(tmp_path / "params.safetensors")
    assert saved.keys() == {"lora.a", "lora.b"}
    np.testing.assert_array_equal(saved["lora.b"], got["lora"]["b"])
    described = json.loads((tmp_path / "run.json").read_text())
    assert "crc32 of frozen params" in described
    assert not any("kernel" in name for name in described["checkpoint"])
    other = params | {"base": {"kernel": params["base"]["kernel"] + 1}}
    with pytest.raises(ValueError, match="crc32 of frozen params"):
        unlearned(other, folder=tmp_path)


def test_an_interrupted_run_of_adapters_ends_like_one_that_was_not(tmp_path):
    def interrupt(params, metrics):
        if metrics["step"] == 6:
            raise KeyboardInterrupt

    params = adapted()
    with pytest.raises(KeyboardInterrupt):
        unlearned(params, folder=tmp_path, every=3, callbacks=[interrupt])
    resumed, whole = unlearned(params, folder=tmp_path, every=3)[0], unlearned(params, every=3)[0]
    for a, b in zip(*map(jax.tree.leaves, (resumed, whole)), strict=True):
        np.testing.assert_array_equal(a, b)


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(64, 8, rngs=rngs), nnx.LoRA(8, 2, 3, rngs=rngs)])
        self.lora_scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.layers[1](self.layers[0](x)) * self.lora_scale


def test_nnx_filters():
    graph, params = nnx.split(Adapted(nnx.Rngs(0)))
    chosen = trainable(params, nnx.LoRAParam)

    def fn(params, batch):
        loss = lambda x, target: jnp.mean((nnx.merge(graph, params)(x) - target) ** 2)
        return eu.Losses(loss(batch["forget"], 1.0), loss(batch["retain"], 0.0))

    got, _ = eu.unlearn(
        fn, params, FORGET, RETAIN, optax.adam(1e-2), BUDGET, steps=5, batch_size=8, trainable=chosen
    )
    flat, moved = dict(nnx.to_flat_state(params)), dict(nnx.to_flat_state(got))
    for path, variable in flat.items():
        same = np.array_equal(variable.get_value(), moved[path].get_value())
        assert same == (not isinstance(variable, nnx.LoRAParam)), path
    with pytest.raises(ValueError, match="no variable"):
        trainable(params, nnx.BatchStat)
