"""Likelihood ratios, relearning and step costs against closed forms, scipy and scikit-learn."""

import functools
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics

from eupmu_jax.evaluation import likelihood_ratio_attack, logit_confidence, relearning_curve, step_cost
from eupmu_jax.evaluation.likelihood_ratio import area, true_positive_rate


@pytest.mark.slow
def test_import_leaves_the_extra_alone():
    code = (
        "import sys; import eupmu_jax.evaluation; "
        "extras = {'sklearn', 'scipy.stats', 'scipy.optimize'}; "
        "sys.exit(', '.join(extras & sys.modules.keys()) or None)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_logit_confidence_is_the_log_odds():
    p = scipy.special.softmax(np.random.default_rng(0).normal(size=(50, 4)), -1)
    y = np.arange(50) % 4
    expected = scipy.special.logit(p[np.arange(50), y])
    before = p.copy()
    np.testing.assert_allclose(logit_confidence(p, y), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(p, before)


def test_logit_confidence_of_certainty():
    """1 - p would round to 0 for both of the first two; the others' sum tells them apart."""
    p = np.array([[1.0, 1e-20, 0.0], [1.0, 1e-30, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    got = logit_confidence(p, [0, 0, 0, 1])
    ceiling = 126 * math.log(2)
    np.testing.assert_allclose(got, [20 * math.log(10), 30 * math.log(10), ceiling, -ceiling], rtol=1e-6)


def test_logit_confidence_refuses_logits():
    with pytest.raises(ValueError, match="softmax"):
        logit_confidence([[3.0, -1.0]], [0])
    with pytest.raises(ValueError, match="labels must be integers"):
        logit_confidence([[0.5, 0.5]], [0.0])


def test_attack_by_hand():
    """Shadows 0 are told wrongly (0 looks retrained), 1 and 2 rightly; 5 answers of 6 are right."""
    result = likelihood_ratio_attack([[0.0], [10.0], [11.0]], [[1.0], [2.0], [3.0]])
    assert result["auc"] == pytest.approx(2 / 3)
    assert result["accuracy"] == pytest.approx(500 / 6)
    np.testing.assert_allclose(result["per_example"], [500 / 6])
    assert result["tpr_at_1_fpr"] == pytest.approx(200 / 3)


def test_attack_equals_scipy_and_scikit_learn():
    rng = np.random.default_rng(0)
    u, r = rng.normal(0.8, 1.5, (5, 300)), rng.normal(0, rng.uniform(0.5, 2, 300), (5, 300))

    def log_pdf(shown, fitted):
        m = len(fitted)
        squares = np.sum((fitted - np.mean(fitted, 0)) ** 2, 0)
        variance = (squares + 16 * np.mean(squares / (m - 1))) / (m + 15)
        return scipy.stats.norm.logpdf(shown, np.mean(fitted, 0), np.sqrt(variance))

    areas, rates, right = [], [], []
    truth = np.repeat([1, 0], 300)
    for s in range(5):
        others = [i for i in range(5) if i != s]
        scores = np.concatenate([log_pdf(x[s], u[others]) - log_pdf(x[s], r[others]) for x in (u, r)])
        areas.append(sklearn.metrics.roc_auc_score(truth, scores))
        fpr, tpr, _ = sklearn.metrics.roc_curve(truth, scores, drop_intermediate=False)
        rates.append(100 * tpr[fpr <= 0.01].max())
        right.append(((scores > 0) == truth).reshape(2, 300))
    result = likelihood_ratio_attack(u, r)
    assert result["auc"] == pytest.approx(np.mean(areas))
    assert result["tpr_at_1_fpr"] == pytest.approx(np.mean(rates))
    assert result["accuracy"] == pytest.approx(100 * np.mean(right))
    np.testing.assert_allclose(result["per_example"], 100 * np.mean(right, (0, 1)))


@pytest.mark.parametrize("n", [99, 100, 250])
def test_roc_with_ties_equals_scikit_learn(n):
    rng = np.random.default_rng(n)
    positives, negatives = rng.integers(2, 9, 70).astype(float), rng.poisson(2, n).astype(float)
    truth, scores = np.repeat([1, 0], (70, n)), np.concatenate([positives, negatives])
    assert area(positives, negatives) == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores))
    fpr, tpr, _ = sklearn.metrics.roc_curve(truth, scores, drop_intermediate=False)
    assert true_positive_rate(positives, negatives) == pytest.approx(tpr[fpr <= 0.01].max())


def within_sampling_error(samples, expected):
    return abs(np.mean(samples) - expected) < 4 * np.std(samples, ddof=1) / len(samples) ** 0.5


@pytest.mark.parametrize("shadows", [3, 4, 8])
def test_one_world_cannot_be_told_from_itself(shadows):
    """Leaving the shown model out of its own world alone gives 0.46, 0.476 and 0.493 here."""
    rng = np.random.default_rng(shadows)
    results = [likelihood_ratio_attack(*rng.normal(size=(2, shadows, 2000))) for _ in range(30)]
    assert within_sampling_error([result["auc"] for result in results], 0.5)
    assert within_sampling_error([result["accuracy"] for result in results], 50)
    assert within_sampling_error([result["tpr_at_1_fpr"] for result in results], 100 * 21 / 2001)
    spread = np.std([result["per_example"] for result in results])
    assert 40 < spread * shadows**0.5 < 55


def test_one_world_whose_examples_move_together():
    """One curve over the scores of all fits gives an area of 0.445 here."""
    rng = np.random.default_rng(0)
    sample = lambda: rng.normal(size=(8, 1)) + 0.3 * rng.normal(size=(8, 20))
    results = [likelihood_ratio_attack(sample(), sample()) for _ in range(500)]
    assert within_sampling_error([result["auc"] for result in results], 0.5)
    assert within_sampling_error([result["accuracy"] for result in results], 50)


@pytest.mark.parametrize("shift", [1.0, 2.0, -2.0])
def test_power_for_known_means(shift):
    """Too little forgetting and too much are recognised alike."""
    rng = np.random.default_rng(0)
    result = likelihood_ratio_attack(rng.normal(shift, 1, (100, 400)), rng.normal(0, 1, (100, 400)))
    assert result["auc"] == pytest.approx(scipy.stats.norm.cdf(abs(shift) / 2**0.5), abs=0.01)
    assert result["accuracy"] == pytest.approx(100 * scipy.stats.norm.cdf(abs(shift) / 2), abs=1)
    rate = scipy.stats.norm.sf(scipy.stats.norm.isf(0.01) - abs(shift))
    assert result["tpr_at_1_fpr"] == pytest.approx(100 * rate, abs=3)


def test_power_for_known_spreads():
    """P(|3 x| > |y|) = 2 atan(3) / pi for normal x and y: a mean is not all that gives away."""
    rng = np.random.default_rng(0)
    result = likelihood_ratio_attack(rng.normal(0, 3, (60, 400)), rng.normal(0, 1, (60, 400)))
    assert result["auc"] == pytest.approx(2 * math.atan(3) / math.pi, abs=0.01)


def test_the_example_that_is_not_forgotten_is_named():
    rng = np.random.default_rng(0)
    u, r = rng.normal(size=(2, 32, 200))
    u[:, 7] += 6
    result = likelihood_ratio_attack(u, r)
    assert result["per_example"].shape == (200,)
    assert np.argmax(result["per_example"]) == 7
    assert result["per_example"][7] > 95
    assert abs(result["auc"] - 0.5) < 0.03


def test_shadows_that_agree_to_the_last_bit():
    same, other = np.full((4, 3), 0.5), np.full((4, 3), 0.25)
    tied = likelihood_ratio_attack(same, same)
    assert (tied["auc"], tied["accuracy"], tied["tpr_at_1_fpr"]) == (0.5, 50, 0)
    apart = likelihood_ratio_attack(same, other)
    assert (apart["auc"], apart["accuracy"], apart["tpr_at_1_fpr"]) == (1, 100, 100)


@pytest.mark.parametrize(
    ("unlearned", "retrained", "match"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), "one shape"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "shadows >= 3"),
        (np.zeros((3, 0)), np.zeros((3, 0)), "n >= 1"),
        (np.zeros(3), np.zeros(3), "shadows >= 3"),
        (np.full((3, 1), np.nan), np.zeros((3, 1)), "finite"),
        (np.zeros((3, 1)), np.full((3, 1), np.inf), "finite"),
    ],
)
def test_bad_confidences(unlearned, retrained, match):
    with pytest.raises(ValueError, match=match):
        likelihood_ratio_attack(unlearned, retrained)


def squared(w, target):
    return jnp.sum((w - target) ** 2) / 2


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("every", [1, 3, 12])
def test_relearning_a_quadratic(every):
    """From 0 to a target c by steps of 0.2: c (1 - 0.8^t)."""
    target = jnp.array([1.0, -2.0, 3.0])
    batches = jnp.broadcast_to(target, (12, 3))
    got = relearning_curve(squared, lambda w: w, jnp.zeros(3), batches, optax.sgd(0.2), every)
    expected = np.outer(1 - 0.8 ** np.arange(0, 13, every), target)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_relearning_equals_a_loop():
    """Momentum, batches that differ, and a pytree of scores."""
    rng = np.random.default_rng(0)
    batches = {"x": jnp.asarray(rng.normal(size=(6, 5, 3)), jnp.float32)}
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    loss = lambda params, batch: jnp.mean((batch["x"] @ params["w"] - 1) ** 2)
    score = lambda params: {"norm": jnp.sum(params["w"] ** 2), "w": params["w"], "positive": params["w"] > 0}
    optimizer = optax.sgd(0.1, momentum=0.9)
    got = relearning_curve(loss, score, params, batches, optimizer, every=2)
    state, expected = optimizer.init(params), [score(params)]
    for t in range(6):
        grads = jax.grad(loss)(params, {"x": batches["x"][t]})
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if t % 2 == 1:
            expected.append(score(params))
    expected = jax.tree.map(lambda *s: np.stack(s), *expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)
    assert got["w"].shape == (4, 3)
    assert got["positive"].dtype == bool


def test_relearning_under_jit_vmap_and_donation():
    curve = functools.partial(relearning_curve, squared, jnp.sum, optimizer=optax.adam(0.1), every=2)
    starts, batches = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 4, 2))
    got = jax.jit(jax.vmap(curve))(starts, batches)
    assert got.shape == (3, 3)
    for i in range(3):
        np.testing.assert_allclose(got[i], curve(starts[i], batches[i]), rtol=1e-6)
    donated = jax.jit(lambda w, batches: (curve(w, batches), 2 * w), donate_argnums=0)
    np.testing.assert_allclose(donated(jnp.array(starts[0]), batches[0])[0], got[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("batches", "every", "match"),
    [
        (jnp.ones((4, 2)), 3, "multiple of every"),
        (jnp.ones((4, 2)), 0, "every >= 1"),
        (jnp.ones((0, 2)), 1, "one steps >= 1"),
        (jnp.float32(1), 1, "one steps >= 1"),
        ((), 1, "one steps >= 1"),
        ((jnp.ones((4, 2)), jnp.ones((5, 2))), 1, "one steps >= 1"),
        ((jnp.ones((4, 2)), jnp.float32(1)), 1, "one steps >= 1"),
    ],
)
def test_bad_batches(batches, every, match):
    with pytest.raises(ValueError, match=match):
        relearning_curve(squared, jnp.sum, jnp.zeros(2), batches, optax.sgd(0.1), every)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_cost_of_a_matrix_product():
    m, n, k = 8, 16, 32
    cost = step_cost(jnp.matmul, array(m, k), array(k, n))
    size = 4 * (m * k + k * n + m * n)
    expected = {"flops": 2 * m * n * k, "bytes_accessed": size, "temporary_bytes": 0, "peak_bytes": size}
    assert cost == expected
    assert all(type(figure) is float for figure in cost.values())
    assert step_cost(lambda a, b: a @ b, jnp.ones((m, k)), jnp.ones((k, n))) == expected


def test_cost_respects_donation_and_counts_temporaries():
    add = lambda w, x: w + x
    assert step_cost(add, array(100), array(100))["peak_bytes"] == 1200
    assert step_cost(jax.jit(add, donate_argnums=0), array(100), array(100))["peak_bytes"] == 800
    cost = step_cost(lambda x, y: (x @ y) @ y, array(50, 50), array(50, 50))
    assert cost["temporary_bytes"] >= 4 * 50 * 50
    assert cost["peak_bytes"] == 3 * 4 * 50 * 50 + cost["temporary_bytes"]


def test_cost_executes_nothing():
    def step(x):
        jax.debug.callback(lambda: pytest.fail("executed"))
        return x * x

    step_cost(step, jnp.ones(3))
    jax.effects_barrier()


def test_cost_counts_a_loop_once_and_the_dearer_branch():
    once = step_cost(lambda x: x @ x, array(64, 64))["flops"]
    loop = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=10)[0]
    branches = lambda flag, x: jax.lax.cond(flag, lambda x: (x @ x) @ x, lambda x: x @ x, x)
    assert step_cost(loop, array(64, 64))["flops"] == pytest.approx(once, rel=0.01)
    flag = jax.ShapeDtypeStruct((), bool)
    assert step_cost(branches, flag, array(64, 64))["flops"] == pytest.approx(2 * once, rel=0.01)


def test_cost_is_nan_where_the_backend_is_silent():
    silent = types.SimpleNamespace(cost_analysis=lambda: None, memory_analysis=lambda: None)
    step = types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=lambda: silent))
    assert all(math.isnan(figure) for figure in step_cost(step, 1.0).values())


@pytest.mark.parametrize("gradients", [1, 2, 5])
def test_gradients_per_step(gradients):
    """A scalarised step costs the one gradient of both losses, an extragradient step two."""
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    both = lambda w, forget, retain: loss(w, retain) - loss(w, forget)

    def step(w, forget, retain):
        point = w
        for _ in range(gradients):
            point = w - 0.1 * jax.grad(both)(point, forget, retain)
        return point

    args = array(64, 64), array(32, 64), array(32, 64)
    ratio = step_cost(step, *args)["flops"] / step_cost(jax.grad(both), *args)["flops"]
    assert ratio == pytest.approx(gradients, rel=0.02)


def test_gradients_of_disjoint_batches_cost_one_gradient_of_their_sum():
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    both = lambda w, forget, retain: loss(w, retain) - loss(w, forget)
    apart = lambda w, forget, retain: (jax.grad(loss)(w, retain), jax.grad(loss)(w, forget))
    args = array(64, 64), array(32, 64), array(32, 64)
    ratio = step_cost(apart, *args)["flops"] / step_cost(jax.grad(both), *args)["flops"]
    assert ratio == pytest.approx(1, rel=0.02)
