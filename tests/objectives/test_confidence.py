"""The confidence, its target, and the confidence of the unseen: closed forms, both ends, quantiles."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import strategies as st

from eupmu_jax import evaluation, objectives

CLASSES = 5


def sample(seed=0, shape=(6,), scale=2.0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(*shape, CLASSES)), rng.integers(0, CLASSES, shape)


CONFIDENCE, TO_TARGET = jax.jit(objectives.confidence), jax.jit(objectives.confidence_target)


def gradient(function, x):
    return jax.jit(jax.grad(lambda x: function(x).sum()))(x)


def among_others(logits, labels):
    """The prediction among the classes other than the label, 0 at the label."""
    is_label = np.arange(CLASSES) == labels[..., None]
    return scipy.special.softmax(np.where(is_label, -np.inf, logits), -1)


def huber(d):
    return np.where(np.abs(d) <= 1, d**2 / 2, np.abs(d) - 0.5)


# Confidence


@pytest.mark.usefixtures("x64")
def test_confidence_is_that_of_the_attack():
    logits, labels = sample()
    p = scipy.special.softmax(logits, -1)
    found = CONFIDENCE(logits, labels)
    np.testing.assert_allclose(found, evaluation.logit_confidence(p, labels), rtol=1e-12)
    of_tokens = CONFIDENCE(logits.reshape(2, 3, -1), labels.reshape(2, 3))
    np.testing.assert_allclose(of_tokens, found.reshape(2, 3), rtol=1e-14)


MARGINS = np.array([-1e4, -200.0, -80.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 80.0, 200.0, 1e4])


def test_confidence_saturates_at_neither_end():
    """In float32, where both p and 1 - p round to 0 or 1 for most of these."""
    others = np.array([0.3, -0.2, 1.1])
    logits = np.stack([MARGINS, *np.broadcast_to(others[:, None], (3, len(MARGINS)))], -1).astype(np.float32)
    labels = np.zeros(len(MARGINS), int)
    expected = MARGINS - scipy.special.logsumexp(others)
    np.testing.assert_allclose(CONFIDENCE(logits, labels), expected, rtol=1e-6, atol=3e-7)
    slope = gradient(lambda x: CONFIDENCE(x, labels), logits)
    expected = np.append(1, -scipy.special.softmax(others))
    np.testing.assert_allclose(slope, np.broadcast_to(expected, slope.shape), rtol=1e-5, atol=1e-6)


def test_confidence_of_what_does_not_count():
    logits, labels = sample(1, (2, 3))
    mask = np.array([[True, False, True], [False, True, True]])
    logits[~mask], labels[~mask] = np.nan, -100
    np.testing.assert_array_equal(np.isnan(CONFIDENCE(logits, labels, mask)), ~mask)
    total = lambda x: jnp.sum(CONFIDENCE(x, labels, mask), where=mask)
    slope = gradient(total, jnp.asarray(logits, jnp.float32))
    np.testing.assert_array_equal(slope[~mask], 0)
    assert np.all(np.isfinite(slope))


# The target


@pytest.mark.usefixtures("x64")
def test_target_by_hand():
    (logits, labels), reference = sample(), sample(1)[0]
    c = evaluation.logit_confidence(scipy.special.softmax(logits, -1), labels)
    target = c + np.array([0.0, 0.5, -0.5, 1.0, -3.0, 30.0])
    without = TO_TARGET(logits, labels, target)
    np.testing.assert_allclose(without, [0, 0.125, 0.125, 0.5, 2.5, 29.5], rtol=1e-11, atol=1e-28)
    p, q = among_others(logits, labels), among_others(reference, labels)
    expected = without + scipy.special.rel_entr(q, p).sum(-1)
    np.testing.assert_allclose(TO_TARGET(logits, labels, target, reference), expected, rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_target_has_its_gradient_in_closed_form():
    (logits, labels), reference = sample(2), sample(3)[0]
    target = np.linspace(-4, 4, 6)
    y = np.eye(CLASSES)[labels]
    p, q = among_others(logits, labels), among_others(reference, labels)
    c = evaluation.logit_confidence(scipy.special.softmax(logits, -1), labels)
    pull = np.clip(c - target, -1, 1)[:, None] * (y - p)
    for given, expected in (((target,), pull), ((target, reference), pull + p - q)):
        found = gradient(lambda x, g=given: TO_TARGET(x, labels, *g), logits)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)
    nothing = gradient(lambda given: TO_TARGET(logits, labels, *given), (target, reference))
    assert not any(map(np.any, nothing))


def test_target_is_precise_at_both_ends():
    """The distance from the target in float32, and a gradient of 1 however far it is."""
    logits = np.stack([MARGINS, np.zeros(len(MARGINS))], -1).astype(np.float32)
    labels = np.zeros(len(MARGINS), int)
    for target in (-30.0, 0.0, 30.0):
        targets = np.full(len(MARGINS), target, np.float32)

        def total(x, targets=targets):
            values = TO_TARGET(x, labels, targets)
            return values.sum(), values

        slope, values = jax.jit(jax.grad(total, has_aux=True))(logits)
        np.testing.assert_allclose(values, huber(MARGINS - target), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(slope[:, 0], np.clip(MARGINS - target, -1, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_odds_among_the_others_do_not_see_the_label():
    logits, labels = sample(4)
    target = np.asarray(CONFIDENCE(logits, labels))
    shifted = logits + 7 * np.eye(CLASSES)[labels] + 3
    value = TO_TARGET(logits, labels, target, shifted)
    np.testing.assert_allclose(value, 0, atol=1e-14)
    # Of two classes there is one other, which has no odds to keep.
    two, of_two = logits[:, :2], labels % 2
    given = two, of_two, np.asarray(CONFIDENCE(two, of_two))
    np.testing.assert_allclose(TO_TARGET(*given, -two), 0, atol=1e-14)


def test_odds_among_the_others_are_precise_where_the_label_is_certain():
    """In float32, with 1 - p_y = e^-10000: the others' own logits are exact."""
    logits = np.array([[1e4, 0.25, -0.5, 0.0, 1.5]], np.float32)
    reference = np.array([[1e4, 1.0, 0.5, -0.25, 0.0]], np.float32)
    labels, target = np.zeros(1, int), np.asarray(CONFIDENCE(logits, np.zeros(1, int)))
    wide = (among_others(x.astype(np.float64), labels) for x in (reference, logits))
    expected = scipy.special.rel_entr(*wide).sum(-1)
    value = TO_TARGET(logits, labels, target, reference)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("has_reference", [False, True])
def test_tokens_have_the_mean_of_those_that_count(has_reference):
    logits, labels = sample(5, (2, 3))
    reference = sample(6, (2, 3))[0] if has_reference else None
    target = np.random.default_rng(7).normal(size=(2, 3))
    mask = np.array([[True, False, True], [False, True, False]])
    one = lambda x: None if x is None else x.reshape(6, *x.shape[2:])
    each = TO_TARGET(one(logits), one(labels), one(target), one(reference))
    expected = np.mean(each.reshape(2, 3), -1, where=mask)
    for x in (logits, target, *([reference] if has_reference else [])):
        x[~mask] = np.nan
    labels[~mask] = -100
    function = lambda x: TO_TARGET(x, labels, target, reference, mask)
    np.testing.assert_allclose(function(logits), expected, rtol=1e-12)
    slope = gradient(function, logits)
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(np.any(slope != 0, -1), mask)


def test_a_target_that_is_none_is_not_hidden():
    logits, labels = sample(0, (2,))
    value = TO_TARGET(logits, labels, np.array([np.nan, 0.0]))
    np.testing.assert_array_equal(np.isnan(value), [True, False])


def test_descent_ends_at_the_target_from_both_sides():
    logits, labels = (jnp.asarray(x) for x in sample(8, (4,)))
    logits = logits.astype(jnp.float32)
    target = np.array([-2.0, 0.5, 3.0, 6.0], np.float32)
    loss = lambda x: TO_TARGET(x, labels, target, logits).sum()
    found = jax.lax.fori_loop(0, 1500, lambda _, x: x - 0.3 * jax.grad(loss)(x), logits)
    np.testing.assert_allclose(CONFIDENCE(found, labels), target, atol=1e-3)
    kept, before = (among_others(np.asarray(x, np.float64), np.asarray(labels)) for x in (found, logits))
    np.testing.assert_allclose(kept, before, atol=1e-3)


# The confidence of the unseen


def by_definition(c, phi, c_unseen, phi_unseen, bins):
    """Loops, ranks by SciPy, and the nearest by a sort; for phi without ties."""
    targets = []
    for i in range(len(c)):
        near = lambda phi, center=phi[i]: np.argsort(np.abs(phi - center))[: -(-len(phi) // bins)]
        seen, unseen = near(phi), near(phi_unseen)
        rank = scipy.stats.rankdata(c[seen])[list(seen).index(i)]
        targets.append(scipy.stats.mstats.mquantiles(c_unseen[unseen], (rank - 0.5) / len(seen), 0.5, 0.5)[0])
    return np.array(targets)


@pytest.mark.parametrize("bins", [1, 4, 25])
def test_quantiles_by_definition(bins):
    rng = np.random.default_rng(bins)
    phi, phi_unseen = rng.normal(size=60), rng.normal(size=43)
    c, c_unseen = 3 + 2 * phi + rng.normal(size=60), 2 * phi_unseen + rng.normal(size=43)
    found = objectives.unseen_confidence(c, phi, c_unseen, phi_unseen, bins)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_definition(c, phi, c_unseen, phi_unseen, bins), rtol=1e-12)
    in_columns = objectives.unseen_confidence(c, phi[:, None], c_unseen, phi_unseen[:, None], bins)
    np.testing.assert_array_equal(in_columns, found)


def test_what_memory_added_is_taken_away():
    """Confidences that memory raised by 4 nats come back to what the difficulty alone foretells."""
    rng = np.random.default_rng(0)
    phi, phi_unseen = rng.uniform(0, 5, 500), rng.uniform(0, 5, 400)
    noise, noise_unseen = 0.3 * rng.normal(size=500), 0.3 * rng.normal(size=400)
    unseen = 2 * phi + noise
    found = objectives.unseen_confidence(unseen + 4, phi, 2 * phi_unseen + noise_unseen, phi_unseen, 25)
    assert abs(np.mean(found - unseen)) < 0.1
    # Without the conditioning the distribution is right, too; the spread about each example is not.
    assert np.std(found - unseen) < 0.3
    assert scipy.stats.ks_2samp(found, unseen).pvalue > 0.2


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    hnp.arrays(np.float64, 12, elements=st.floats(-9, 9, width=16)),
    hnp.arrays(np.int64, 12, elements=st.integers(0, 2)),
    st.sampled_from([None, 1, 3, 12]),
)
def test_seen_and_unseen_alike_change_nothing(c, phi, bins):
    """Whatever the ties of confidences and of phi."""
    np.testing.assert_allclose(objectives.unseen_confidence(c, phi, c, phi, bins), c, atol=1e-12)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 10**6), st.sampled_from([None, 1, 4]))
def test_ranks_are_kept_and_nothing_else_of_the_seen(seed, bins):
    rng = np.random.default_rng(seed)
    phi, phi_unseen = np.repeat([0, 1, 2], 5), np.repeat([0, 1, 2], 4)
    c, c_unseen = rng.normal(size=15), rng.normal(size=12)
    found = objectives.unseen_confidence(c, phi, c_unseen, phi_unseen, bins)
    monotone = objectives.unseen_confidence(np.exp(3 * c), phi, c_unseen, phi_unseen, bins)
    np.testing.assert_array_equal(monotone, found)
    moved = objectives.unseen_confidence(c, phi, 2 * c_unseen + 1, phi_unseen, bins)
    np.testing.assert_allclose(moved, 2 * found + 1, atol=1e-12)
    order, order_unseen = rng.permutation(15), rng.permutation(12)
    given = c[order], phi[order], c_unseen[order_unseen], phi_unseen[order_unseen], bins
    np.testing.assert_array_equal(objectives.unseen_confidence(*given), found[order])
    for group in range(3):
        one, other = c[phi == group], found[phi == group]
        assert np.all(np.diff(other[np.argsort(one)]) >= 0)
        assert other.min() >= c_unseen.min()
        assert other.max() <= c_unseen.max()


def test_groups_are_apart():
    """Classes, or fields and places of tokens: each is as if it were there alone."""
    rng = np.random.default_rng(1)
    phi = np.array([(field, place) for field in (0, 7) for place in (1, 2, 9) for _ in range(4)])
    phi_unseen = np.repeat(np.unique(phi, axis=0), 3, 0)[rng.permutation(18)]
    c, c_unseen = rng.normal(size=24), rng.normal(size=18)
    found = objectives.unseen_confidence(c, phi, c_unseen, phi_unseen, bins=None)
    for group in np.unique(phi, axis=0):
        own, others = (phi == group).all(-1), (phi_unseen == group).all(-1)
        alone = objectives.unseen_confidence(c[own], c[own] * 0, c_unseen[others], c_unseen[others] * 0, 1)
        np.testing.assert_array_equal(found[own], alone)


ONES = np.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: objectives.unseen_confidence(ONES, ONES, ONES[:3], ONES[:3], 4),
            ValueError,
            r"bins.*\[1, 3\]",
        ),
        (lambda: objectives.unseen_confidence(ONES, ONES, ONES, ONES, 0), ValueError, "bins.*got 0"),
        (lambda: objectives.unseen_confidence(ONES, ONES, ONES, ONES, 2.0), TypeError, "float"),
        (
            lambda: objectives.unseen_confidence(ONES, [0, 0, 1, 3], ONES, [0, 1, 1, 2], None),
            ValueError,
            r"forget example 3, \[3.0\].*bins=None",
        ),
        (
            lambda: objectives.unseen_confidence(ONES, ONES[:3], ONES, ONES, 1),
            ValueError,
            r"phi_forget.*\[4\]",
        ),
        (lambda: objectives.unseen_confidence(ONES, ONES, [], [], 1), ValueError, "c_held_out must.*n >= 1"),
        (lambda: objectives.unseen_confidence([ONES], ONES, ONES, ONES, 1), ValueError, r"c_forget.*\[n\]"),
        (
            lambda: objectives.unseen_confidence(ONES, ONES, ONES * np.nan, ONES, 1),
            ValueError,
            "c_held_out must be finite",
        ),
        (
            lambda: objectives.unseen_confidence(ONES, ONES * np.inf, ONES, ONES, 1),
            ValueError,
            "phi_forget must be finite",
        ),
        (
            lambda: objectives.unseen_confidence(ONES, np.ones((4, 2)), ONES, ONES, 1),
            ValueError,
            "as many columns",
        ),
        (
            lambda: objectives.confidence_target(np.ones((2, 3)), np.ones(2), ONES[:2]),
            TypeError,
            "labels must be",
        ),
        (
            lambda: objectives.confidence_target(np.ones((2, 3)), np.array([0, 1]), ONES),
            ValueError,
            r"target must have the shape \(2,\), that of labels",
        ),
        (
            lambda: objectives.confidence_target(np.ones((2, 3)), np.array([0, 1]), np.array([0, 1])),
            TypeError,
            "target must be floating",
        ),
        (
            lambda: objectives.confidence_target(np.ones((2, 3)), np.array([0, 1]), ONES[:2], ONES),
            ValueError,
            "reference_logits must have",
        ),
        (lambda: objectives.confidence(np.ones((2, 3)), np.array([0, 3])), ValueError, r"labels.*\[0, 3\)"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match) as raised:
        call()
    assert len(str(raised.value)) < 600
