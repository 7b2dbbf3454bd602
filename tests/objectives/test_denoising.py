"""Objectives of diffusion models: closed forms, what masks hide, and budgets on a rise that starts from 0."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import eupmu_jax as eu
from eupmu_jax import objectives
from eupmu_jax.method import budget

SHAPE = (5, 3, 2)


def some(*names, shape=SHAPE):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for _ in names]


# Closed forms


@pytest.mark.usefixtures("x64")
def test_redirects_of_velocities_and_of_the_noises_that_they_imply():
    clean, noise, predicted, target = some("clean", "noise", "predicted", "target")
    angle = np.linspace(0.1, 1.5, len(clean))
    alpha, sigma = (np.reshape(rate, (-1, 1, 1)) for rate in (np.cos(angle), np.sin(angle)))
    x = alpha * clean + sigma * noise
    # The formula of the docstring, from the definition of the velocity.
    np.testing.assert_allclose(alpha * (alpha * noise - sigma * clean) + sigma * x, noise, rtol=1e-12)
    of_noises = objectives.noise_prediction_redirect(
        alpha * predicted + sigma * x, alpha * target + sigma * x
    )
    weighted = objectives.velocity_prediction_redirect(predicted, target, signal_rate=np.cos(angle))
    np.testing.assert_allclose(weighted, of_noises, rtol=1e-12)
    plain = objectives.velocity_prediction_redirect(predicted, target)
    np.testing.assert_allclose(plain, ((predicted - target) ** 2).mean((1, 2)), rtol=1e-14)


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(hnp.arrays(np.float64, (3, *SHAPE), elements=st.floats(-100, 100, allow_subnormal=False)))
def test_the_rise_is_the_difference_of_two_losses(arrays):
    predicted, reference, target = arrays
    loss = lambda p: ((p - target) ** 2).mean((1, 2))
    rise = objectives.denoising_rise(predicted, reference, target)
    np.testing.assert_allclose(rise, loss(predicted) - loss(reference), rtol=1e-9, atol=1e-9)
    assert not np.any(objectives.denoising_rise(predicted, predicted, target))
    np.testing.assert_allclose(objectives.denoising_rise(reference, predicted, target), -rise, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_rise_has_the_gradient_of_the_denoising_loss():
    arrays = some("predicted", "reference", "target")
    predicted, _, target = arrays
    total = lambda *arrays: jnp.sum(objectives.denoising_rise(*arrays))
    of_predicted, *others = jax.grad(total, argnums=(0, 1, 2))(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(of_predicted, 2 * (predicted - target) / predicted[0].size, rtol=1e-12)
    assert not np.any(others)
    redirect = lambda *arrays: jnp.sum(
        objectives.velocity_prediction_redirect(*arrays[:2], signal_rate=arrays[2][:, 0, 0])
    )
    _, *others = jax.grad(redirect, argnums=(0, 1))(*map(jnp.asarray, arrays))
    assert not np.any(others)


def test_a_small_rise_is_precise_in_float32():
    """Where the difference of the two losses has lost every digit."""
    predicted, target = (array.astype(np.float32) for array in some("predicted", "target"))
    reference = predicted + np.float32(1e-6)
    wide = [array.astype(np.float64) for array in (predicted, reference, target)]
    with jax.enable_x64(True):
        exact = objectives.denoising_rise(*wide)
    np.testing.assert_allclose(objectives.denoising_rise(predicted, reference, target), exact, rtol=1e-5)


def test_dtypes():
    narrow, wide = jnp.zeros((2, 3), jnp.bfloat16), jnp.zeros((2, 3))
    of = lambda function, *args, **more: jax.eval_shape(function, *args, **more)
    assert of(objectives.denoising_rise, narrow, narrow, narrow).dtype == jnp.float32
    assert of(objectives.denoising_rise, narrow, wide, narrow).shape == (2,)
    rate = jnp.zeros(2, jnp.bfloat16)
    found = of(objectives.velocity_prediction_redirect, narrow, narrow, signal_rate=rate)
    assert found.dtype == jnp.float32


# Masks and bad input

MASK = np.array([True, False, True, True, False])


@pytest.mark.parametrize(
    "values",
    [
        lambda x: objectives.velocity_prediction_redirect(x, jnp.ones(SHAPE), MASK),
        lambda x: objectives.velocity_prediction_redirect(
            x, jnp.ones(SHAPE), MASK, signal_rate=jnp.asarray([0.5, jnp.nan, 0.5, 0.5, jnp.inf])
        ),
        lambda x: objectives.denoising_rise(x, jnp.zeros(SHAPE), jnp.ones(SHAPE), MASK),
        lambda x: objectives.denoising_rise(x, 2 * x, x - 1, MASK),
    ],
)
def test_what_does_not_count_is_not_seen(values):
    x = jnp.asarray(some("x")[0], jnp.float32)
    hidden = x.at[1].set(jnp.nan).at[4].set(jnp.inf)
    np.testing.assert_array_equal(np.isnan(values(hidden)), ~MASK)
    total = lambda x: objectives.masked_mean(values(x), MASK).total
    (found, slope), (expected, clean) = (jax.value_and_grad(total)(y) for y in (hidden, x))
    assert float(found) == float(expected)
    np.testing.assert_array_equal(slope, np.where(MASK[:, None, None], clean, 0))
    assert np.all(np.isnan(np.asarray(objectives.denoising_rise(x, x, hidden))) == ~MASK)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: objectives.velocity_prediction_redirect(x, x[:2]), ValueError, "target_velocity must"),
        (lambda x: objectives.velocity_prediction_redirect(x.astype(int), x), TypeError, "predicted_vel"),
        (lambda x: objectives.velocity_prediction_redirect(x, x, MASK[:2]), ValueError, r"mask.*\(5,\)"),
        (
            lambda x: objectives.velocity_prediction_redirect(x, x, signal_rate=0.5),
            ValueError,
            r"signal_rate must.*\(5,\)",
        ),
        (
            lambda x: objectives.velocity_prediction_redirect(x, x, signal_rate=np.ones(5, int)),
            TypeError,
            "signal_rate must be floating",
        ),
        (lambda x: objectives.denoising_rise(x, x[0], x), ValueError, "reference must have"),
        (lambda x: objectives.denoising_rise(x, x, x[..., :1]), ValueError, "target must have"),
        (lambda x: objectives.denoising_rise(x, x, x, x), TypeError, "mask must be boolean"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(some("x")[0])


# Budgets on a rise


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("utilities", [(), (3,)])
def test_a_budget_sees_no_difference_between_a_loss_and_its_rise(utilities):
    """Whatever is subtracted from R and from R_0, the exponents are the same; also below R_0."""
    total, baseline = jnp.full(utilities, 0.1), 7.0
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(-0.01, 0.05, (80, *utilities)), 0) + 0.1
    assert walk.min() < -0.1
    assert walk.max() > 0.1
    exponents = {}
    for shift in (0.0, baseline):
        state, found = budget.init(jnp.ones(utilities), shift), []
        step = jax.jit(budget.control)
        for t, rise in enumerate(walk):
            exponent, state = step(state, eu.Losses(jnp.exp(-0.1 * t), rise + shift), total)
            found.append(exponent)
        exponents[shift] = np.array(found)
    np.testing.assert_allclose(exponents[0.0], exponents[baseline], atol=1e-9)
    assert np.ptp(exponents[0.0]) > 1


CLASSES, SIGNAL, NOISE = 3, 0.6, 0.8
FORGOTTEN, OTHER = 0, 1


def predict(weights, x, label):
    """The noise in x: for each class another multiple of what all share."""
    return (weights["shared"] + weights["own"])[label][:, None] * x


def noised(key, rows):
    noise = jax.random.normal(key, rows["x"].shape)
    return SIGNAL * rows["x"] + NOISE * noise, noise


def losses_fn(params, batch, *, subtracted=True):
    """Class 0 is to be denoised as another one; each retain set is a utility."""
    keys = jax.random.split(batch["key"])
    model, original = params["model"], params["original"]
    x, _ = noised(keys[0], batch["forget"])
    predicted = predict(model, x, batch["forget"]["label"])
    redirected = predict(original, x, jnp.full_like(batch["forget"]["label"], OTHER))
    means = []
    sets = batch["retain"]
    for rows in sets if isinstance(sets, list) else [sets]:
        x, noise = noised(keys[1], rows)
        p, p_0 = (predict(weights, x, rows["label"]) for weights in (model, original))
        rises = objectives.denoising_rise(p, p_0, noise) if subtracted else jnp.mean((p - noise) ** 2, 1)
        means.append(jnp.mean(rises))
    forget = objectives.noise_prediction_redirect(predicted, redirected).mean()
    return eu.Losses(forget, jnp.stack(means) if isinstance(sets, list) else means[0])


def rows_of(label, amount, seed):
    x = np.random.default_rng(seed).normal(size=(amount, 4)).astype(np.float32)
    return {"x": x, "label": np.full(amount, label, np.int32)}


def original(shared=0.2):
    """Classes 0 and 1 are denoised differently; classes share a part, so that forgetting costs something."""
    own = jnp.array([0.9, -0.4, 0.5]) * NOISE
    return {"shared": jnp.full(1, shared), "own": own}


def unlearned(constraint, retain, params, rate=0.02, losses_fn=losses_fn, **settings):
    """The shared part alone is trained: what class 0 becomes, the others become as well."""
    return eu.unlearn(
        losses_fn, {"model": params, "original": params}, rows_of(FORGOTTEN, 64, 1), retain,
        optax.adam(rate), constraint, batch_size=16,
        trainable=lambda path: path == "model.shared", **settings,
    )  # fmt: skip


@pytest.mark.slow
def test_a_budget_on_the_rise_starts_from_nothing_and_is_kept():
    retain = rows_of(2, 300, 2)
    params, history = unlearned(eu.Budget(0.02), retain, original(), steps=100, held_out=rows_of(2, 200, 3))
    promise = history.promise
    assert promise.baseline == 0
    assert promise.holds
    assert 0.5 < promise.share <= 1
    # E (w x - n)^2 = w^2 - 2 * .8 w + 1 of the weight w = shared + own, since E x^2 = 1 and E x n = .8.
    risk = lambda w: w**2 - 2 * NOISE * w + 1
    before, after = (float(p["shared"][0] + p["own"][2]) for p in (params["original"], params["model"]))
    assert risk(after) - risk(before) == pytest.approx(promise.rise, abs=0.01)
    assert promise.held_out_rise == pytest.approx(promise.rise, abs=0.01)
    assert int(history.steps["skipped_steps"][-1]) == 0


@pytest.mark.slow
def test_of_several_utilities_all_are_brought_back():
    """At a rate that a budget cannot hold within a step: the repair measures each from 0."""
    retain = [rows_of(1, 100, 2), rows_of(2, 140, 3)]
    params, history = unlearned(
        eu.Budget([0.5, 0.003]), retain, original(), rate=0.1, steps=2, initial_multiplier=0.01
    )
    promise = history.promise
    np.testing.assert_array_equal(promise.baseline, [0, 0])
    assert promise.repair_steps >= 1
    assert promise.holds
    assert promise.share[1] == pytest.approx(1, abs=0.1)
    assert float(params["model"]["shared"][0]) < float(params["original"]["shared"][0]) - 0.005


@pytest.mark.slow
def test_a_rise_below_nothing_is_fine():
    """Forgetting makes class 2 better, below the original's loss, and nothing is taken for broken."""
    _, history = unlearned(eu.Budget(0.02), rows_of(2, 300, 2), original(shared=1.4), steps=60)
    assert history.promise.holds
    assert history.promise.rise < -0.05
    assert "fell by" in eu.verdict(history.promise)
    assert not np.any(history.steps["infeasible"])
    assert int(history.steps["skipped_steps"][-1]) == 0


def test_the_rise_has_little_of_the_noise_of_the_loss():
    """Near the original, over batches: what a lagged tolerance and a budget are steered by."""
    near = {"model": original(shared=0.19), "original": original()}
    rows = rows_of(2, 32, 2)
    batch = lambda key: {"forget": rows, "retain": rows, "key": key}
    keys = jax.random.split(jax.random.key(0), 200)
    spread = {
        subtracted: float(jnp.std(jax.vmap(lambda key, fn=fn: fn(near, batch(key)).retain)(keys)))
        for subtracted in (True, False)
        for fn in [functools.partial(losses_fn, subtracted=subtracted)]
    }
    assert spread[True] < spread[False] / 20
