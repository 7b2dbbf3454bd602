"""Objectives against scipy, closed-form gradients, and what masks, extremes and bad labels must not do."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import eupmu_jax as eu
from eupmu_jax import objectives

CLASSES = 5


def cached(logits):
    """The same reference for every prediction: classes 2 and 0 with .5 and .3, .2 for all others."""
    shape = logits.shape[:-1]
    each = lambda values, dtype: jnp.broadcast_to(jnp.array(values, dtype), (*shape, 2))
    others = jnp.full(shape, np.log(0.2), logits.dtype)
    return objectives.TopLogProbabilities(
        each([2, 0], jnp.int32), each(np.log([0.5, 0.3]), logits.dtype), others
    )


OF_LABELS = (objectives.cross_entropy, objectives.gradient_ascent, objectives.unlikelihood)
OF_SEQUENCES = {
    "cross_entropy": objectives.cross_entropy,
    "unlikelihood": objectives.unlikelihood,
    "kl_to_uniform": lambda logits, labels, mask=None: objectives.kl_to_uniform(logits, mask),
    "kl_to_reference": lambda logits, labels, mask=None: objectives.kl_to_reference(
        logits, jnp.sin(3 * jnp.arange(logits.size, dtype=logits.dtype)).reshape(logits.shape), mask
    ),
    "confidence_target": lambda logits, labels, mask=None: objectives.confidence_target(
        logits, labels, jnp.cos(jnp.maximum(labels, 0).astype(logits.dtype)), mask=mask
    ),
    "kl_to_cached_reference": lambda logits, labels, mask=None: objectives.kl_to_cached_reference(
        logits, cached(logits), mask
    ),
    "sequence_log_probability": objectives.sequence_log_probability,
    "npo": lambda logits, labels, mask=None: objectives.npo(
        objectives.sequence_log_probability(logits, labels, mask), jnp.full(len(logits), -6.0, logits.dtype)
    ),
    "simnpo": lambda logits, labels, mask=None: objectives.simnpo(
        objectives.sequence_log_probability(logits, labels, mask),
        jnp.sum(jnp.ones_like(labels) if mask is None else mask, -1),
        beta=2.5,
        gamma=0.1,
    ),
}
COMPILED = {name: jax.jit(function) for name, function in OF_SEQUENCES.items()}
# Those that average or normalise: no token at all is no value.
AVERAGING = [name for name in OF_SEQUENCES if name not in ("sequence_log_probability", "npo")]


def sample(seed=0, shape=(6,), classes=CLASSES, scale=2.0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(*shape, classes)), rng.integers(0, classes, shape)


@functools.cache
def compiled_both(function):
    def both(first, *rest):
        values, pull_back = jax.vjp(lambda first: function(first, *rest), first)
        return values, pull_back(jnp.ones_like(values))[0]

    return jax.jit(both)


def values_and_gradient(function, *args):
    """Values, and the gradient of their sum with respect to the first argument; compiled, to be fast."""
    return compiled_both(function)(jnp.asarray(args[0]), *args[1:])


def gradient(function, *args):
    return values_and_gradient(function, *args)[1]


def one_hot(labels, classes=CLASSES):
    return np.eye(classes)[labels]


# Values


@pytest.mark.usefixtures("x64")
def test_of_labels_by_scipy():
    logits, labels = sample()
    p = scipy.special.softmax(logits, -1)[np.arange(6), labels]
    for function, expected in zip(OF_LABELS, (-np.log(p), np.log(p), -np.log1p(-p)), strict=True):
        np.testing.assert_allclose(function(logits, labels), expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_divergences_by_scipy():
    logits, reference = sample(0)[0], sample(1)[0]
    p, q = scipy.special.softmax(logits, -1), scipy.special.softmax(reference, -1)
    uniform = np.full_like(p, 1 / CLASSES)
    np.testing.assert_allclose(
        objectives.kl_to_uniform(logits), scipy.stats.entropy(uniform, p, axis=-1), rtol=1e-12
    )
    np.testing.assert_allclose(
        objectives.kl_to_reference(logits, reference), scipy.stats.entropy(q, p, axis=-1), rtol=1e-12
    )


@pytest.mark.usefixtures("x64")
def test_of_sequences_by_hand():
    logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]])
    targets, mask = np.array([[0, 2, 1]]), np.array([[True, True, False]])
    log_p, log_ref = np.log(0.5 * 0.8), np.log(0.5)
    sequence = objectives.sequence_log_probability(logits, targets, mask)
    np.testing.assert_allclose(sequence, [log_p], rtol=1e-14)
    np.testing.assert_allclose(objectives.cross_entropy(logits, targets, mask), [-log_p / 2], rtol=1e-14)
    np.testing.assert_allclose(
        objectives.unlikelihood(logits, targets, mask), [-np.log(0.5 * 0.2) / 2], rtol=1e-14
    )
    npo = 2 / 0.3 * np.log(1 + 0.8**0.3)
    np.testing.assert_allclose(objectives.npo(sequence, np.array([log_ref]), 0.3), [npo], rtol=1e-14)
    simnpo = 2 / 2.5 * np.log(1 + np.exp(2.5 * log_p / 2 + 0.7))
    np.testing.assert_allclose(objectives.simnpo(sequence, mask.sum(-1), 2.5, 0.7), [simnpo], rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_redirect_by_hand():
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 3, 4, 4, 2))
    expected = ((predicted - target) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(objectives.noise_prediction_redirect(predicted, target), expected, rtol=1e-14)
    np.testing.assert_allclose(
        objectives.noise_prediction_redirect(predicted[:, 0, 0, 0], target[:, 0, 0, 0]),
        (predicted - target)[:, 0, 0, 0] ** 2,
    )


@pytest.mark.usefixtures("x64")
def test_masked_mean_by_hand():
    values, mask = np.array([1.0, np.nan, 4.0, np.inf]), np.array([True, False, True, False])
    assert tuple(map(float, objectives.masked_mean(values, mask))) == (5, 2)
    assert tuple(map(float, objectives.masked_mean(values[[0, 2]]))) == (5, 2)
    assert tuple(map(float, objectives.masked_mean(values, np.zeros(4, bool)))) == (0, 0)
    assert tuple(map(float, objectives.masked_mean(np.zeros(0)))) == (0, 0)
    of_tokens, tokens = np.array([[1.0, np.nan], [4.0, 7.0]]), np.array([[True, False], [True, True]])
    assert tuple(map(float, objectives.masked_mean(of_tokens, tokens))) == (12, 3)
    mean = lambda values: objectives.masked_mean(values**2, mask).total
    np.testing.assert_array_equal(jax.grad(mean)(jnp.array([1.0, np.nan, 4.0, np.inf]))[::2], [2, 8])
    total = lambda values: objectives.masked_mean(values, mask).total
    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(values)), [1, 0, 1, 0])


# Gradients


@pytest.mark.usefixtures("x64")
def test_gradients_in_closed_form():
    (logits, labels), reference = sample(), sample(1)[0]
    p, q = scipy.special.softmax(logits, -1), scipy.special.softmax(reference, -1)
    y = one_hot(labels)
    odds = np.sum(p * y, -1, keepdims=True) / (1 - np.sum(p * y, -1, keepdims=True))
    expected = {
        objectives.cross_entropy: p - y,
        objectives.gradient_ascent: y - p,
        objectives.unlikelihood: odds * (y - p),
    }
    for function, derivative in expected.items():
        got = gradient(lambda x, function=function: function(x, labels), logits)
        np.testing.assert_allclose(got, derivative, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(gradient(objectives.kl_to_uniform, logits), p - 1 / CLASSES, atol=1e-14)
    to_reference = lambda x: objectives.kl_to_reference(x, reference)
    np.testing.assert_allclose(gradient(to_reference, logits), p - q, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_gradients_by_finite_differences(name):
    logits, labels = sample(2, (2, 3), 4, 1.0)
    mask = np.array([[True, True, False], [True, True, True]])
    function = jax.jit(lambda logits: OF_SEQUENCES[name](logits, labels, mask))
    check_grads(function, (jnp.asarray(logits),), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_no_gradient_flows_into_what_is_detached():
    a, b = sample(0)[0], sample(1)[0]
    for function in (objectives.kl_to_reference, objectives.noise_prediction_redirect):
        assert not np.any(gradient(lambda b, function=function: function(a, b), b))
        assert np.all(gradient(lambda a, function=function: function(a, b), a))
    assert not np.any(gradient(lambda b: objectives.npo(a[0], b), b[0]))


@pytest.mark.usefixtures("x64")
def test_npo_eases_off():
    """Its gradient is the weight 2 pi^beta / (pi^beta + pi_ref^beta)."""
    value, reference = np.array([-4.0, -9.0, -300.0]), np.array([-9.0, -9.0, -9.0])
    got = gradient(lambda value: objectives.npo(value, reference, 0.2), value)
    np.testing.assert_allclose(got, 2 / (1 + np.exp(-0.2 * (value - reference))), rtol=1e-12)
    assert got[2] < 1e-20


SLOPE_OF_NPO = jax.jit(jax.grad(lambda *args: jnp.sum(objectives.npo(*args))))


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.floats(-30, 30), st.floats(1e-6, 1e-4))
def test_npo_of_a_small_beta_is_gradient_ascent(ratio, beta):
    value, reference = jnp.array([ratio - 40]), jnp.array([-40.0])
    shifted = objectives.npo(value, reference, beta) - 2 * np.log(2) / beta
    np.testing.assert_allclose(shifted, [ratio], atol=beta * ratio**2 / 3 + 1e-8)
    slope = SLOPE_OF_NPO(value, reference, beta)
    np.testing.assert_allclose(slope, [1], atol=beta * 31)


@pytest.mark.usefixtures("x64")
def test_simnpo_is_npo_of_a_token_without_a_reference():
    value = np.array([-3.0, -8.0])
    simnpo = objectives.simnpo(value, np.ones(2, int), beta=0.4)
    np.testing.assert_allclose(simnpo, objectives.npo(value, np.zeros(2), 0.4), rtol=1e-14)
    assert np.all(objectives.simnpo(value, np.ones(2, int), beta=0.4, gamma=1.0) > simnpo)


# Properties

TO_REFERENCE, TO_UNIFORM = jax.jit(objectives.kl_to_reference), jax.jit(objectives.kl_to_uniform)
logits_arrays = hnp.arrays(np.float64, (3, 4), elements=st.floats(-50, 50))


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(logits_arrays, logits_arrays)
def test_divergences_are_not_negative_and_zero_only_between_equals(a, b):
    p, q = scipy.special.softmax(a, -1), scipy.special.softmax(b, -1)
    for kl, other in ((TO_REFERENCE(a, b), q), (TO_UNIFORM(a), np.full_like(p, 1 / 4))):
        # Pinsker's inequality
        assert np.all(kl >= np.abs(p - other).sum(-1) ** 2 / 2 - 1e-11)
    np.testing.assert_allclose(TO_REFERENCE(a, a + 3.0), 0, atol=1e-11)
    np.testing.assert_allclose(TO_UNIFORM(np.full((3, 4), a[0, 0])), 0, atol=1e-11)


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.integers(0, 10**6), st.floats(-1e3, 1e3), st.sampled_from(sorted(OF_SEQUENCES)))
def test_nothing_depends_on_a_shift_of_logits_or_the_order_of_examples(seed, shift, name):
    logits, labels = sample(seed, (3, 2))
    if name == "kl_to_reference":
        function = lambda logits, labels: TO_REFERENCE(logits, logits**2)
        shifted = TO_REFERENCE(logits + shift, logits**2 - shift)
    else:
        function = COMPILED[name]
        shifted = function(jnp.asarray(logits + shift), labels)
    values = function(jnp.asarray(logits), labels)
    np.testing.assert_allclose(shifted, values, rtol=1e-9, atol=1e-10)
    reordered = function(jnp.asarray(logits[::-1]), labels[::-1])
    np.testing.assert_allclose(reordered, values[::-1], rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [name for name in OF_SEQUENCES if name != "kl_to_reference"])
def test_padding_changes_nothing(name):
    """Garbage in what does not count: neither the value nor the gradient of what does, in any order."""
    function, (logits, labels) = OF_SEQUENCES[name], sample(4, (3, 2))
    padded = np.concatenate([logits, np.full((3, 2, CLASSES), np.nan)], 1)
    padded[1, 2:] = [np.inf] * CLASSES
    padded_labels = np.concatenate([labels, np.full((3, 2), -100)], 1)
    mask = np.arange(4) < np.array([[2], [2], [2]])
    expected, slope = values_and_gradient(function, logits, labels)
    for columns in (np.arange(4), np.array([2, 0, 3, 1])):
        args = padded[:, columns], padded_labels[:, columns], mask[:, columns]
        values, back = values_and_gradient(function, *args)
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        back = np.asarray(back)[:, np.argsort(columns)]
        np.testing.assert_allclose(back[:, :2], slope, rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(back[:, 2:], 0)


@pytest.mark.parametrize("name", AVERAGING)
def test_examples_without_tokens_are_nan_and_leave_no_trace(name):
    """No zero that a mean could take for a value, and no NaN in the gradient once it is left out."""
    function, (logits, labels) = OF_SEQUENCES[name], sample(5, (3, 2))
    logits = jnp.asarray(logits, jnp.float32).at[1].set(jnp.nan)
    mask = jnp.array([[True, True], [False, False], [True, False]])

    def mean(logits):
        values = function(logits, labels, mask)
        return objectives.masked_mean(values, mask.any(-1)).total, values

    slope, values = jax.jit(jax.grad(mean, has_aux=True))(logits)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False])
    assert np.all(np.isfinite(slope))
    assert np.any(slope[0])
    assert not np.any(slope[1])


def test_simnpo_without_length_leaves_no_trace():
    length = np.array([0, 3])
    mean = lambda value: objectives.masked_mean(objectives.simnpo(value, length, 2.5), length > 0).total
    total, slope = values_and_gradient(mean, np.array([0.0, -6.0], np.float32))
    assert np.isfinite(total)
    np.testing.assert_array_equal(slope != 0, [False, True])
    assert np.all(np.isfinite(slope))


def test_masked_classification_and_noise_leave_no_trace():
    logits, labels = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), np.array([1, -100])
    mask = np.array([True, False])
    for values in (
        lambda x: objectives.cross_entropy(x, labels, mask),
        lambda x: objectives.unlikelihood(x, labels, mask),
        lambda x: objectives.kl_to_uniform(x, mask),
        lambda x: objectives.kl_to_reference(x, x * x, mask),
        lambda x: objectives.npo(-objectives.cross_entropy(x, labels, mask), jnp.zeros(2)),
        lambda x: objectives.noise_prediction_redirect(x, jnp.ones((2, 2)), mask),
    ):
        mean = lambda x, values=values: objectives.masked_mean(values(x), mask)
        total, slope = values_and_gradient(lambda x, mean=mean: mean(x).total, logits)
        assert np.isfinite(total)
        assert np.all(np.isfinite(slope))
        assert not np.any(slope[1])


# Numbers at the edge


@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_extreme_bfloat16_logits_are_finite_in_float32(name):
    logits = jnp.array([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]], [[1e4, 1e4, 1e4]], [[0.0, 1e-4, 0.0]]])
    logits = logits.astype(jnp.bfloat16)
    labels = np.zeros((4, 1), int)
    values, slope = values_and_gradient(OF_SEQUENCES[name], logits, labels)
    assert values.dtype == jnp.float32
    assert np.all(np.isfinite(values))
    assert slope.dtype == jnp.bfloat16
    assert np.all(np.isfinite(slope.astype(jnp.float32)))


def test_widths():
    dtype = lambda function, *args: jax.eval_shape(function, *args).dtype
    narrow, wide = jnp.zeros((2, 3), jnp.bfloat16), jnp.zeros((2, 3))
    assert dtype(objectives.kl_to_reference, narrow, wide) == jnp.float32
    assert dtype(objectives.noise_prediction_redirect, narrow, narrow) == jnp.float32
    assert dtype(objectives.npo, narrow[0], wide[0]) == jnp.float32
    # A count in bfloat16 would stop at 256.
    assert tuple(map(float, objectives.masked_mean(jnp.ones(1000, jnp.bfloat16)))) == (1000, 1000)
    with jax.enable_x64(True):
        assert dtype(objectives.kl_to_reference, narrow, np.zeros((2, 3))) == jnp.float64
        assert dtype(objectives.cross_entropy, np.zeros((2, 3)), np.zeros(2, int)) == jnp.float64


def test_unlikelihood_is_precise_at_both_ends():
    """Relative to float64, where neither 1 - p nor p may be rounded away."""
    margins = np.array([-80.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 80.0, 1e4])
    logits, labels = np.stack([margins, np.zeros(10)], -1).astype(np.float32), np.zeros(10, int)
    values, slope = values_and_gradient(objectives.unlikelihood, logits, labels)
    wide = logits[:, 0].astype(np.float64)
    np.testing.assert_allclose(values, np.logaddexp(0, wide), rtol=2e-6)
    np.testing.assert_allclose(slope[:, 0], scipy.special.expit(wide), rtol=2e-6)


def test_classes_that_are_ruled_out():
    """A logit of -inf, as in a padded vocabulary: as if it were not there, with finite gradients."""
    logits, labels = sample(6, (4, 1), CLASSES)
    labels = labels % 3
    logits, low = logits.astype(np.float32), logits.astype(np.float32)
    logits[..., 3:], low[..., 3:] = -np.inf, -200.0
    to_reference = lambda x, labels: objectives.kl_to_reference(x, x[::-1])
    for function in (COMPILED["cross_entropy"], COMPILED["unlikelihood"], to_reference):
        (values, slope), (expected, expected_slope) = (
            values_and_gradient(function, x, labels) for x in (logits, low)
        )
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-7)
    values, slope = values_and_gradient(COMPILED["kl_to_uniform"], logits, labels)
    p = scipy.special.softmax(logits[:, 0, :3], -1)
    np.testing.assert_allclose(values, scipy.stats.entropy(np.full_like(p, 1 / 3), p, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(slope[:, 0], np.pad(p - 1 / 3, ((0, 0), (0, 2))), atol=1e-6)


def test_labels_that_are_ruled_out():
    logits = np.array([[[0.3, -0.2, 0.0, 1.0, -np.inf]]], np.float32)
    label = np.full((1, 1), 4)
    assert COMPILED["cross_entropy"](logits, label) == np.inf
    values, slope = values_and_gradient(COMPILED["unlikelihood"], logits, label)
    assert values == 0
    assert not np.any(slope)
    values, slope = values_and_gradient(COMPILED["npo"], logits, label)
    assert values == 0
    assert not np.any(slope)
    assert TO_REFERENCE(logits, np.zeros_like(logits)) == np.inf
    assert np.isfinite(TO_REFERENCE(np.zeros_like(logits), logits))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_diverged_logits_that_count_are_not_hidden(name, bad):
    logits, labels = sample(7, (2, 2))
    logits[0, 0, 1] = bad
    values = COMPILED[name](jnp.asarray(logits, jnp.float32), labels)
    np.testing.assert_array_equal(np.isnan(values), [True, False])
    values = TO_REFERENCE(jnp.zeros((2, 2, CLASSES)), jnp.asarray(logits, jnp.float32))
    np.testing.assert_array_equal(np.isnan(values), [True, False])


# Wrong labels


@pytest.mark.parametrize(("num_classes", "dtype"), [(2, np.int32), (3, np.int32), (100, np.uint8)])
def test_wrong_labels_are_uniform_over_the_others(num_classes, dtype):
    labels = np.repeat(np.arange(num_classes), 40_000 // num_classes).astype(dtype)
    wrong = np.asarray(objectives.wrong_labels(jax.random.key(1), labels, num_classes))
    assert wrong.dtype == np.int32
    assert not np.any(wrong == labels)
    assert wrong.min() == 0
    assert wrong.max() == num_classes - 1
    if num_classes > 2:
        shift = (wrong - labels.astype(int)) % num_classes
        assert scipy.stats.chisquare(np.bincount(shift, minlength=num_classes)[1:]).pvalue > 0.01
        of_last = wrong[labels == num_classes - 1]
        assert scipy.stats.chisquare(np.bincount(of_last, minlength=num_classes)[:-1]).pvalue > 0.01


def test_wrong_labels_of_what_is_no_label():
    key, labels = jax.random.key(0), np.array([[0, 7], [-100, 1]])
    mask = np.array([[True, False], [False, True]])
    wrong = objectives.wrong_labels(key, labels, 3, mask)
    np.testing.assert_array_equal(wrong == -1, ~mask)
    with pytest.raises(ValueError, match=r"\[0, 3\) where they count, got -100 to 7"):
        objectives.wrong_labels(key, labels, 3)
    compiled = jax.jit(objectives.wrong_labels, static_argnums=2)
    np.testing.assert_array_equal(compiled(key, labels, 3) == -1, ~mask)
    np.testing.assert_array_equal(compiled(key, labels, 3, mask), wrong)
    for classes in (1, 0, -3):
        with pytest.raises(ValueError, match=f"num_classes must be >= 2.*got {classes}"):
            objectives.wrong_labels(key, np.zeros(2, int), classes)
    with pytest.raises(TypeError):
        objectives.wrong_labels(key, np.zeros(2, int), 2.5)
    with pytest.raises(TypeError, match="labels must be integers"):
        objectives.wrong_labels(key, np.zeros(2), 3)
    assert objectives.wrong_labels(key, np.uint8([255]), 256) != 255


# Bad input


@pytest.mark.parametrize("name", ["cross_entropy", "unlikelihood"])
@pytest.mark.parametrize("label", [-1, CLASSES, 2**32, -(2**31)])
def test_labels_out_of_range(name, label):
    """Known: an error that names the range. Traced: NaN, also where Python would count from the end."""
    logits, labels = sample()
    labels[2] = label
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\) where they count"):
        OF_SEQUENCES[name](logits, labels)
    if abs(label) >= 2**32:
        return
    expected = np.arange(6) == 2
    np.testing.assert_array_equal(np.isnan(COMPILED[name](logits, labels)), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(np.isnan(COMPILED[name](logits, labels)), expected)
    assert np.isnan(COMPILED["sequence_log_probability"](logits[None], labels[None]))


def test_labels_narrower_than_the_number_of_classes():
    labels = np.uint8([255, 3])
    logits = np.zeros((2, 300), np.float32)
    np.testing.assert_allclose(objectives.cross_entropy(logits, labels), np.log(300), rtol=1e-6)


LOGITS, LABELS, MASK = np.zeros((2, 3, 4)), np.zeros((2, 3), int), np.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: objectives.cross_entropy(LOGITS[0, 0], 0),
            ValueError,
            r"logits must have.*\[B, C\].*\(4,\)",
        ),
        (lambda: objectives.cross_entropy(LOGITS[..., :0], LABELS), ValueError, "logits must have the shape"),
        (lambda: objectives.cross_entropy(LOGITS, LABELS[0]), ValueError, r"labels.*shape \(2, 3\).*\(3,\)"),
        (lambda: objectives.cross_entropy(LOGITS, LABELS, MASK[0]), ValueError, r"mask.*\(2, 3\).*\(3,\)"),
        (lambda: objectives.cross_entropy(LOGITS, LABELS, MASK * 1.0), TypeError, "mask must be bool.*> 0"),
        (lambda: objectives.cross_entropy(LOGITS, LABELS * 1.0), TypeError, "labels must be integers, got"),
        (lambda: objectives.cross_entropy(LABELS, LABELS[0, :2]), TypeError, "logits must be floating point"),
        (lambda: objectives.kl_to_uniform(LOGITS[0, 0]), ValueError, "logits must have the shape"),
        (
            lambda: objectives.kl_to_reference(LOGITS, LOGITS[0]),
            ValueError,
            r"reference_logits.*that of logits",
        ),
        (lambda: objectives.kl_to_reference(LOGITS, LOGITS > 0), TypeError, "reference_logits must be float"),
        (
            lambda: objectives.sequence_log_probability(LOGITS[0], LABELS[0]),
            ValueError,
            r"logits must have the shape \[B, T, V\]",
        ),
        (
            lambda: objectives.sequence_log_probability(LOGITS, LABELS + 4),
            ValueError,
            r"targets must lie in \[0, 4\)",
        ),
        (lambda: objectives.npo(LOGITS[0, 0], LOGITS[0, 0, :1]), ValueError, "reference_log_probability"),
        (
            lambda: objectives.npo(LOGITS[0], LOGITS[0]),
            ValueError,
            r"log_probability must have the shape \[B\]",
        ),
        (lambda: objectives.npo(LOGITS[0, 0], LOGITS[0, 0], 0), ValueError, "beta must be > 0, got 0"),
        (
            lambda: objectives.npo(LOGITS[0, 0], LOGITS[0, 0], np.ones((3, 1))),
            ValueError,
            "beta must have the",
        ),
        (
            lambda: objectives.simnpo(LOGITS[0, 0], np.ones(4), 1.0, np.ones((4, 1))),
            ValueError,
            "gamma must have the shape",
        ),
        (lambda: objectives.npo(LOGITS[0, 0], LOGITS[0, 0], np.nan), ValueError, "beta must be > 0, got nan"),
        (lambda: objectives.simnpo(LOGITS[0, 0], np.ones(3), 1.0), ValueError, r"length must.*\(4,\)"),
        (lambda: objectives.simnpo(LOGITS[0, 0], np.ones(4), -1.0), ValueError, "beta must be > 0, got -1"),
        (lambda: objectives.noise_prediction_redirect(0.0, 0.0), ValueError, "predicted_noise must have"),
        (
            lambda: objectives.noise_prediction_redirect(LOGITS, LOGITS[:1]),
            ValueError,
            "target_noise must have",
        ),
        (lambda: objectives.noise_prediction_redirect(LOGITS, LOGITS, MASK), ValueError, r"mask.*\(2,\)"),
        (lambda: objectives.masked_mean(LOGITS), ValueError, r"values must have the shape \[B\].*\[B, T\]"),
        (lambda: objectives.masked_mean(LOGITS[0, 0, 0]), ValueError, r"values must have the shape \[B\]"),
        (lambda: objectives.masked_mean(LOGITS[0], MASK[0]), ValueError, r"mask.*\(3, 4\).*\(3,\)"),
        (lambda: objectives.masked_mean(LABELS[0]), TypeError, "values must be floating"),
        (lambda: objectives.masked_mean(LOGITS[0, 0], MASK[0]), ValueError, r"mask.*\(4,\).*\(3,\)"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


# With the rest of JAX and of the package


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_jit_and_vmap_without_implicit_promotion(name):
    logits, labels = sample(8, (4, 3, 2))
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32)
    mask = jnp.ones((4, 3, 2), bool).at[:, 1, 1].set(False)
    function = OF_SEQUENCES[name]
    each = jnp.stack([COMPILED[name](*part) for part in zip(logits, labels, mask, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(logits, labels, mask), each, rtol=1e-5)


def batch_and_params():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(64, 6)).astype(np.float32), rng.integers(0, 3, 64)
    mask = np.arange(64) % 5 > 0
    x[~mask] = 0
    batch = {"x": x, "label": np.where(mask, labels, -100), "mask": mask}
    return batch, {"w": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)}


FORGETS = {
    "random labels": lambda z, z_0, y, m: objectives.cross_entropy(
        z, objectives.wrong_labels(jax.random.key(0), y, 3, m), m
    ),
    "gradient_ascent": lambda z, z_0, y, m: objectives.gradient_ascent(z, y, m),
    "unlikelihood": lambda z, z_0, y, m: objectives.unlikelihood(z, y, m),
    "kl_to_uniform": lambda z, z_0, y, m: objectives.kl_to_uniform(z, m),
    "npo": lambda z, z_0, y, m: objectives.npo(
        objectives.sequence_log_probability(z[:, None], y[:, None], m[:, None]),
        objectives.sequence_log_probability(z_0[:, None], y[:, None], m[:, None]),
    ),
    "simnpo": lambda z, z_0, y, m: objectives.simnpo(
        objectives.sequence_log_probability(z[:, None], y[:, None], m[:, None]), m.astype(int), 2.5
    ),
    "redirect": lambda z, z_0, y, m: objectives.noise_prediction_redirect(z, jnp.roll(z, 1, -1), m),
}


@pytest.mark.parametrize("name", FORGETS)
def test_a_few_steps_forget_while_the_reference_holds(name):
    """Each forget objective falls under `eupmu`, compiled, with a divergence from the original to bound."""
    batch, start = batch_and_params()
    x, mask = batch["x"], batch["mask"]

    def losses_fn(params, batch):
        z, z_0 = batch["x"] @ params["w"], batch["x"] @ start["w"]
        forget = FORGETS[name](z, z_0, batch["label"], batch["mask"])
        retain = objectives.kl_to_reference(z, z_0, batch["mask"])
        return eu.Losses(*(objectives.masked_mean(values, batch["mask"]) for values in (forget, retain)))

    tx = eu.eupmu(losses_fn, optax.sgd(0.05), eu.Tolerance(0.01, measure="lookahead"))
    step, params, state = eu.training_step(tx, jax.tree.map(jnp.copy, start))
    losses = []
    for _ in range(10):
        params, state, info = step(params, state, batch)
        losses.append(float(info.forget_loss))
    assert losses[-1] < losses[0]
    assert int(eu.surgery_info(state).skipped_steps) == 0
    assert np.all(np.isfinite(params["w"]))
    # And a label that is none costs the step, not the model.
    label = batch["label"].copy()
    label[np.flatnonzero(mask)[0]] = 3
    if name not in ("kl_to_uniform", "redirect"):
        before = np.asarray(params["w"])
        params, state, _ = step(params, state, {"x": x, "label": label, "mask": mask})
        assert int(eu.surgery_info(state).skipped_steps) == 1
        np.testing.assert_array_equal(params["w"], before)


def test_uneven_shards_have_the_mean_of_the_whole():
    batch, params = batch_and_params()
    batch["mask"] = batch["mask"] & (np.arange(64) < 44)

    def losses_fn(params, batch):
        forget = objectives.unlikelihood(batch["x"] @ params["w"], batch["label"], batch["mask"])
        retain = objectives.kl_to_uniform(batch["x"] @ params["w"])
        return eu.Losses(objectives.masked_mean(forget, batch["mask"]), objectives.masked_mean(retain))

    losses, *grads = jax.jit(eu.forget_and_retain_grads(losses_fn))(params, batch)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        eu.forget_and_retain_grads(losses_fn, axis_name="batch"),
        mesh=mesh,
        in_specs=(P(), P("batch")),
        out_specs=P(),
    )
    sharded_losses, *sharded_grads = jax.jit(sharded)(params, batch)
    for got, expected in ((sharded_losses, losses), (sharded_grads, grads)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, expected)
