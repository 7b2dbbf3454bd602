"""Diffusion networks against a straight line of NumPy, samplers against closed forms, training, adapters."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from experiments.shared.models import sharding
from experiments.shared.models.diffusion import blocks, dit, hybrid, schedule, training
from experiments.shared.models.diffusion.network import ATTENTION, Network, make_network
from experiments.shared.models.diffusion.sampling import guided, partly_noised, sample
from experiments.shared.models.diffusion.training import Pictures, Recipe, make_trainer
from experiments.shared.models.files import load_params, save_params
from experiments.shared.models.lora import Adapter, LowRank, merged
from tests.representatives import slow_unless

DIT = dit.Config(size=4, channels=2, patch=2, width=12, layers=2, heads=3, labels=(3, 2))
HYBRID = hybrid.Config(size=8, channels=1, stem=4, width=8, layers=2, heads=2, labels=(3,))
SHAPES = {"dit": (4, 4, 2), "hybrid": (8, 8, 1)}
NETWORKS = {
    "dit": make_network(partial(dit.DiT, DIT)),
    "hybrid": make_network(partial(hybrid.Hybrid, HYBRID)),
}
PREDICT = {name: jax.jit(network.predict) for name, network in NETWORKS.items()}


def random_params(name, dtype=jnp.float32, seed=0):
    """Weights that nothing hides in: what starts from 0 is not 0."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5, dtype)
    return jax.tree.map(draw, jax.eval_shape(NETWORKS[name].init, jax.random.key(0)))


def inputs(name, batch=3, dtype=jnp.float32, seed=1):
    rng = np.random.default_rng(seed)
    sizes = DIT.labels if name == "dit" else HYBRID.labels
    labels = np.stack([rng.integers(-1, size, batch) for size in sizes], -1)
    return (
        jnp.asarray(rng.normal(size=(batch, *SHAPES[name])), dtype),
        jnp.asarray(rng.random(batch), dtype),
        labels,
    )


def predicted(name, params, x, t, labels, adapters=()):
    return PREDICT[name](params, x, t, NETWORKS[name].embed(params, labels), adapters)


# The transformer


def straight_line(config, params, image, t, labels):
    """The prediction for one image in float64, with loops over patches, layers, heads and tokens."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    silu = lambda x: x * scipy.special.expit(x)
    gelu = lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    linear = lambda weights, x: weights["weight"] @ x + weights["bias"]
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)

    def modulated(x, shift, scale):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * (1 + scale) + shift

    asked, offset = np.zeros(config.width), 0
    for label, size in zip(labels, config.labels, strict=True):
        if label >= 0:
            asked += p["embed_labels"]["weight"][offset + label]
        offset += size
    rates = np.geomspace(1, blocks.FASTEST, blocks.FREQUENCIES)
    waves = np.concatenate([np.sin(t * rates), np.cos(t * rates)])
    c = p["condition"]
    condition = silu(linear(c["time_down"], silu(linear(c["time_up"], waves))) + asked)

    side, patch = config.size // config.patch, config.patch
    corners = [(i * patch, j * patch) for i in range(side) for j in range(side)]
    tokens = [
        linear(p["embed_pixels"], image[i : i + patch, j : j + patch].ravel()) + position
        for (i, j), position in zip(corners, p["position"], strict=True)
    ]
    for number in range(config.layers):
        layer = at(p["layers"], number)
        a, m = layer["self_attn"], layer["mlp"]
        parts = np.split(linear(layer["modulation"], condition), 6)
        seen = [modulated(x, *parts[:2]) for x in tokens]
        heads = lambda which, a=a, seen=seen: [np.split(linear(a[which], x), config.heads) for x in seen]
        queries, keys, values = heads("q_proj"), heads("k_proj"), heads("v_proj")
        for i in range(len(tokens)):
            mixed = []
            for h in range(config.heads):
                scores = [queries[i][h] @ key[h] / math.sqrt(config.width // config.heads) for key in keys]
                mixed.append(
                    sum(w * v[h] for w, v in zip(scipy.special.softmax(scores), values, strict=True))
                )
            tokens[i] = tokens[i] + parts[2] * linear(a["o_proj"], np.concatenate(mixed))
        for i, x in enumerate(tokens):
            hidden = gelu(linear(m["up_proj"], modulated(x, *parts[3:5])))
            tokens[i] = x + parts[5] * linear(m["down_proj"], hidden)
    shift, scale = np.split(linear(p["modulation"], condition), 2)
    out = np.empty(image.shape)
    for (i, j), x in zip(corners, tokens, strict=True):
        pixels = linear(p["to_pixels"], modulated(x, shift, scale))
        out[i : i + patch, j : j + patch] = pixels.reshape(patch, patch, config.channels)
    return out


@pytest.mark.usefixtures("x64")
def test_the_transformer_in_float64():
    params, (x, t, labels) = random_params("dit", jnp.float64), inputs("dit", dtype=jnp.float64)
    found = predicted("dit", params, x, t, labels)
    assert found.dtype == jnp.float64
    rows = zip(np.asarray(x), np.asarray(t), labels, strict=True)
    expected = [straight_line(DIT, params, *row) for row in rows]
    # jax.nn.dot_product_attention takes its softmax in float32.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", slow_unless(["dit"], NETWORKS))
def test_a_new_network_predicts_nothing(name):
    """So that training starts from the mean."""
    params = jax.jit(NETWORKS[name].init)(jax.random.key(0))
    assert not np.any(predicted(name, params, *inputs(name)))
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == jax.tree.map(
        lambda leaf: leaf.shape, jax.eval_shape(NETWORKS[name].init, jax.random.key(0))
    )


@pytest.mark.parametrize("name", slow_unless(["dit"], NETWORKS))
def test_examples_do_not_see_each_other(name):
    params, given, others = random_params(name), inputs(name), inputs(name, seed=2)
    found = predicted(name, params, *given)
    for i in range(3):
        mixed = [
            np.concatenate([b[:i], a[i : i + 1], b[i + 1 :]]) for a, b in zip(given, others, strict=True)
        ]
        np.testing.assert_allclose(predicted(name, params, *mixed)[i], found[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", slow_unless(["dit"], NETWORKS))
def test_time_and_labels_matter_and_no_label_is_no_vector(name):
    params, (x, t, labels) = random_params(name), inputs(name)
    found = predicted(name, params, x, t, labels)
    assert np.abs(found - predicted(name, params, x, t / 2, labels)).max() > 1e-3
    other = np.where(labels == 0, 1, 0)
    assert np.abs(found - predicted(name, params, x, t, other)).max() > 1e-3
    assert not np.any(NETWORKS[name].embed(params, np.full_like(labels, -1)))


def test_patches_come_back():
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 3))
    tokens = dit.in_patches(x, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 3], x[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(dit.from_patches(tokens, 2, x.shape), x)
    np.testing.assert_array_equal(hybrid.doubled(hybrid.halved(x)), x)
    np.testing.assert_array_equal(hybrid.halved(x)[0, 1, 1], x[0, 2:4, 2:4].ravel())


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"patch \(3\)"):
        dit.Config(size=8, channels=1, patch=3, width=8, layers=1, heads=2, labels=(2,))
    with pytest.raises(ValueError, match=r"heads \(3\)"):
        dit.Config(size=8, channels=1, patch=2, width=8, layers=1, heads=3, labels=(2,))
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        hybrid.Config(size=6, channels=1, stem=4, width=8, layers=1, heads=2, labels=(2,))


def test_slices_are_a_convolution():
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 4, 3), (7, 3, 3, 3)))
    expected = jax.lax.conv_general_dilated(
        x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC")
    )
    np.testing.assert_allclose(hybrid.neighbours(x) @ weight.reshape(7, -1).T, expected, rtol=1e-4, atol=1e-5)


# Adapters and meshes


def random_adapter(name, rank, seed):
    rng = np.random.default_rng(seed)
    weights = NETWORKS[name].new_adapter(jax.random.key(0), rank)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), weights)


@pytest.mark.parametrize("name", slow_unless(["dit"], NETWORKS))
def test_adapters_add_up(name):
    """Unmerged, merged, and merged one after the other; a new one changes nothing."""
    params, given = random_params(name), inputs(name)
    own = [random_adapter(name, 1, 2), random_adapter(name, 2, 3)]
    assert set(own[0]) == set(ATTENTION)
    # Always two, so that one program serves all.
    several, first = (
        [Adapter(*pair) for pair in zip(scales, own, strict=True)] for scales in ((0.7, -1.5), (0.7, 0.0))
    )
    found = predicted(name, params, *given, several)
    assert np.abs(found - predicted(name, params, *given, first)).max() > 1e-4
    np.testing.assert_allclose(found, predicted(name, merged(params, several), *given), rtol=1e-3, atol=1e-4)
    twice = merged(merged(params, several[1:]), several[:1])
    np.testing.assert_allclose(found, predicted(name, twice, *given), rtol=1e-3, atol=1e-4)
    new = [Adapter(1.0, NETWORKS[name].new_adapter(jax.random.key(1), rank)) for rank in (1, 2)]
    np.testing.assert_array_equal(predicted(name, params, *given, new), predicted(name, params, *given))


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    params, (x, t, labels) = random_params("dit"), inputs("dit", batch=4)
    loss = jax.jit(jax.value_and_grad(lambda p, *given: jnp.mean(predicted("dit", p, *given) ** 2)))
    expected, expected_grads = loss(params, x, t, labels)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, sharding.shardings(params, mesh))
        found, grads = loss(sharded, x, t, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads)
    for group, name in (("mlp", "up_proj"), ("self_attn", "o_proj")):
        assert {*sharded["layers"][group][name]["weight"].sharding.spec} == {None, "fsdp", "tensor"}
    assert {*sharded["layers"]["modulation"]["weight"].sharding.spec} == {None, "fsdp", "tensor"}


# The schedule


@pytest.mark.usefixtures("x64")
@settings(max_examples=30, deadline=None)
@given(st.floats(0, schedule.LATEST), st.sampled_from(["velocity", "noise"]))
def test_a_true_prediction_gives_back_the_clean_image(t, kind):
    rng = np.random.default_rng(0)
    clean, noise = np.clip(rng.normal(size=(2, 3, 4)), -1, 1)
    times = jnp.full(3, t)
    x = schedule.noised(clean, noise, times)
    truth = schedule.target(kind, clean, noise, times)
    np.testing.assert_allclose(schedule.clean_of(kind, truth, x, times), clean, atol=1e-9)
    signal_rate, noise_rate = schedule.rates(times)
    np.testing.assert_allclose(signal_rate**2 + noise_rate**2, 1, rtol=1e-12)


def test_the_clean_image_is_in_range():
    found = schedule.clean_of("noise", jnp.full((1, 2), 3.0), jnp.zeros((1, 2)), jnp.array([0.9]))
    assert found.tolist() == [[-1, -1]]


def test_times_are_one_in_each_part():
    times = schedule.stratified_times(jax.random.key(0), 50)
    parts = np.floor(np.asarray(times) / schedule.LATEST * 50)
    assert sorted(parts) == list(range(50))
    # Whoever looks at the first ones alone has seen all of the time.
    assert 10 < parts[:12].mean() < 40


# Samplers

SPREAD, MEAN = 0.2, 0.1


def exact(kind):
    """The best prediction for images whose pixels are normal: everything is linear then."""

    def predict(x, t):
        signal, noise = schedule.rates_like(t, x)
        variance = signal**2 * SPREAD**2 + noise**2
        clean = MEAN + signal * SPREAD**2 / variance * (x - signal * MEAN)
        of_noise = noise / variance * (x - signal * MEAN)
        return of_noise if kind == "noise" else signal * of_noise - noise * clean

    return predict


@pytest.mark.parametrize("kind", ["velocity", "noise"])
def test_ddim_follows_the_flow(kind):
    """Which for normal pixels is a line: noise of one standard deviation becomes a pixel of one."""
    x = jnp.linspace(-2, 2, 9).reshape(1, 3, 3, 1)
    draw = jax.jit(lambda x: sample(exact(kind), jax.random.key(0), x, steps=300, kind=kind))
    np.testing.assert_allclose(draw(x), MEAN + SPREAD * x, atol=5e-3)
    np.testing.assert_array_equal(draw(x), draw(x))


@pytest.mark.slow
def test_ancestral_samples_have_the_distribution_and_forget_their_start():
    x = jax.random.normal(jax.random.key(1), (4000, 1, 1, 1))
    draw = jax.jit(lambda x: sample(exact("velocity"), jax.random.key(0), x, steps=400, eta=1.0))
    found = np.asarray(draw(x)).ravel()
    assert found.mean() == pytest.approx(MEAN, abs=0.02)
    assert found.std() == pytest.approx(SPREAD, rel=0.05)
    assert abs(np.corrcoef(found, np.ravel(x))[0, 1]) < 0.1
    assert np.corrcoef(np.ravel(sample(exact("velocity"), jax.random.key(0), x)), np.ravel(x))[0, 1] > 0.99


def test_a_partly_noised_image_is_drawn_from_there():
    images = jnp.full((2000, 1, 1, 1), 0.5)
    redraw = jax.jit(
        lambda start: sample(
            exact("velocity"), jax.random.key(0), partly_noised(jax.random.key(1), images, start), start=start
        )
    )
    little, much = (np.asarray(redraw(jnp.float32(start))).mean() for start in (0.05, 0.95))
    assert little == pytest.approx(0.5, abs=0.1)
    assert much == pytest.approx(MEAN, abs=0.05)


def test_guidance_goes_from_nothing_through_the_prediction():
    x, t, _ = inputs("dit")
    network = scalar_network()._replace(
        predict=lambda params, x, t, asked, adapters: asked[:, :1, None, None] * x
    )
    asked = jnp.array([[2.0], [-1.0], [0.5]])
    plain = asked[:, :, None, None] * x
    of = lambda guidance: guided(network, {}, asked, guidance)(x, t)
    np.testing.assert_array_equal(of(1.0), plain)
    np.testing.assert_allclose(of(jnp.float32(1)), plain, rtol=1e-6)
    assert not np.any(of(0.0))
    np.testing.assert_allclose(of(3.0), 3 * plain, rtol=1e-6)
    shifted = network._replace(predict=lambda params, x, t, asked, adapters: asked[:, :1, None, None] + x)
    np.testing.assert_allclose(
        guided(shifted, {}, asked, 3.0)(x, t), x + 3 * asked[:, :, None, None], rtol=1e-5, atol=1e-6
    )


# Training


def scalar_network():
    """Predicts one number for each label, whatever it sees: what it learns is known."""
    return Network(
        init=lambda key: {"value": jnp.zeros(3), "none": jnp.zeros([])},
        embed=lambda params, labels: jax.nn.one_hot(labels[:, 0], 3) @ params["value"][:, None],
        predict=lambda params, x, t, asked: (asked[:, :, None, None] + params["none"]) * jnp.ones_like(x),
        new_adapter=lambda key, rank: {},
    )


@pytest.mark.parametrize("kind", slow_unless(["velocity"], ["velocity", "noise"]))
def test_training_uses_the_chosen_rows_alone(kind):
    """Rows that must not be seen are NaN; one program serves any number of rows."""
    x = np.full((20, 2, 2, 1), np.nan, np.float32)
    rows = np.array([1, 5, 6, 13])
    x[rows] = 0.5
    pictures = Pictures(x, np.zeros((20, 1), np.int32))
    train = make_trainer(scalar_network(), Recipe(50, batch_size=8, kind=kind))
    found = train(pictures, rows, 0)
    assert np.isfinite(found.losses).all()
    assert found.losses.shape == (50,)
    np.testing.assert_array_equal(train(pictures, rows, 0).losses, found.losses)
    assert not np.array_equal(train(pictures, rows, 1).losses, found.losses)
    if kind == "velocity":
        assert not np.isfinite(train(pictures, np.arange(20), 0).losses).all()
    with pytest.raises(ValueError, match="multiple of 50, got 70"):
        make_trainer(scalar_network(), Recipe(70))


@pytest.mark.slow
def test_training_learns_the_mean_and_returns_the_average():
    """The best number to predict for the velocity of images of value 1 is -E sigma = -2 / pi."""
    pictures = Pictures(np.ones((10, 1, 1, 1), np.float32), np.full((10, 1), 2, np.int32))
    recipe = Recipe(1000, batch_size=64, rate=3e-2, memory=0.98)
    params = make_trainer(scalar_network(), recipe)(pictures, np.arange(10), 0).params
    # A tenth of the labels is dropped, so that both numbers are learned.
    assert float(params["none"] + params["value"][2]) == pytest.approx(-2 / np.pi, abs=0.03)
    assert float(params["none"]) == pytest.approx(-2 / np.pi, abs=0.15)
    assert params["value"][:2].tolist() == [0, 0]


def test_labels_are_dropped_together():
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4000, 2)))
    found = np.asarray(training.without_some(jax.random.key(0), labels, 0.25))
    gone = (found == -1).all(-1)
    assert gone.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(found[~gone], labels[~gone])


def test_the_loss_of_the_noise_and_of_what_is_asked_for_instead():
    pictures = Pictures(np.ones((6, 1, 1, 1), np.float32), np.full((6, 1), 1, np.int32))
    examples = jax.jit(training.noised_pictures, static_argnums=2)(jax.random.key(0), pictures, "noise")
    params = {"value": jnp.array([0.0, 2.0, 0.0]), "none": jnp.array(0.0)}
    of = partial(training.denoising_loss, scalar_network(), params, examples)
    np.testing.assert_allclose(of(), (np.ravel(examples.target) - 2) ** 2, rtol=1e-5)
    np.testing.assert_allclose(of(jnp.full((6, 1), 5.0)), (np.ravel(examples.target) - 5) ** 2, rtol=1e-5)
    x = np.asarray(schedule.noised(pictures.x, examples.target, examples.t))
    np.testing.assert_allclose(examples.x, x, rtol=1e-6)


# Files


def test_params_come_back_from_their_file(tmp_path):
    params = random_params("dit")
    params["half"] = {"weight": jnp.arange(3, dtype=jnp.float16)}
    save_params(tmp_path / "model.safetensors", params)
    found = load_params(tmp_path / "model.safetensors")
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert found["half"]["weight"].dtype == jnp.float16
    weights = {"q_proj": LowRank(jnp.ones((2, 1, 3)), jnp.zeros((2, 3, 1)))._asdict()}
    save_params(tmp_path / "adapter.safetensors", weights)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "adapter.safetensors"), weights)
