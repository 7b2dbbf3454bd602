"""What is kept of the original model: its top predictions, their divergence, and values of all rows."""

import functools
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies as st

from eupmu_jax import objectives

C = 6
TO_REFERENCE = jax.jit(objectives.kl_to_reference)
TO_CACHED = jax.jit(objectives.kl_to_cached_reference)
TOP = jax.jit(objectives.top_log_probabilities, static_argnums=1)


@functools.partial(jax.jit, static_argnums=2)
def to_top(logits, original, k):
    return objectives.kl_to_cached_reference(logits, objectives.top_log_probabilities(original, k))


def gradient(function, x):
    return jax.jit(jax.grad(lambda x: function(x).sum()))(x)


def logits_of(seed, shape=(4,), scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=(*shape, C))


def merged(p, ids):
    """Probabilities at ids, and of all others together."""
    kept = np.take_along_axis(p, ids, -1)
    others = p.copy()
    np.put_along_axis(others, ids, 0, -1)
    return np.concatenate([kept, others.sum(-1, keepdims=True)], -1)


# Top predictions and their divergence


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [1, 3, 6])
def test_divergence_by_hand(k):
    logits, original = logits_of(0), logits_of(1)
    p, q = scipy.special.softmax(logits, -1), scipy.special.softmax(original, -1)
    ids = np.argsort(-q, -1)[:, :k]
    kept = TOP(original, k)
    np.testing.assert_array_equal(kept.ids, ids)
    np.testing.assert_allclose(np.exp(kept.log_p), np.take_along_axis(q, ids, -1), rtol=1e-12)
    np.testing.assert_allclose(np.exp(kept.log_others), merged(q, ids)[:, -1], rtol=1e-12)
    expected = scipy.special.rel_entr(merged(q, ids), merged(p, ids)).sum(-1)
    np.testing.assert_allclose(TO_CACHED(logits, kept), expected, rtol=1e-11)


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(0, 10**6), st.sampled_from([0.1, 2.0, 30.0]))
def test_divergence_is_a_lower_bound_that_grows_to_the_whole(seed, scale):
    logits, original = logits_of(seed, scale=scale), logits_of(seed + 1, scale=scale)
    kl = [to_top(logits, original, k) for k in (1, 2, 4, 6)]
    assert np.all(np.diff([np.zeros(4), *kl], axis=0) >= -1e-12)
    np.testing.assert_allclose(kl[-1], TO_REFERENCE(logits, original), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(to_top(original, original, 2), 0, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_divergence_has_its_gradient_in_closed_form():
    """p - q of the kept; the others move together, each by its share of them."""
    logits, original = logits_of(2), logits_of(3)
    kept = TOP(original, 2)
    found = gradient(lambda x: TO_CACHED(x, kept), logits)
    p, q = scipy.special.softmax(logits, -1), scipy.special.softmax(original, -1)
    is_kept = np.zeros(p.shape, bool)
    np.put_along_axis(is_kept, np.asarray(kept.ids), True, -1)
    share = p / np.sum(p, -1, keepdims=True, where=~is_kept)
    others = np.sum(q, -1, keepdims=True, where=~is_kept)
    np.testing.assert_allclose(found, p - np.where(is_kept, q, others * share), rtol=1e-10, atol=1e-14)
    of_log_p = lambda log_p: TO_CACHED(logits, kept._replace(log_p=log_p))
    assert not np.any(gradient(of_log_p, kept.log_p))
    assert not np.any(gradient(lambda x: TOP(x, 2).log_p, original))


def test_others_are_precise_where_the_kept_are_all_but_certain():
    """In float32, where 1 minus the kept is 0 although the others are not."""
    logits = np.array([[30.0, 0.0, 1.0, -1.0, 0.5, 2.0]], np.float32)
    original = logits + np.array([0, 0, 5, 5, 5, 5], np.float32)
    kept = TOP(original, 1)
    wide = lambda x: scipy.special.logsumexp(x.astype(np.float64)[:, 1:], -1)
    np.testing.assert_allclose(kept.log_others, wide(original) - 30, rtol=1e-6)
    swapped = TOP(-original, 5)
    np.testing.assert_allclose(swapped.log_others, -30.0 - scipy.special.logsumexp(-original), rtol=1e-6)
    slope = gradient(lambda x: TO_CACHED(x, swapped), -original)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize("k", [3, 6])
def test_classes_that_are_ruled_out(k):
    """All that are allowed are kept, as in a padded vocabulary: the others have nothing, and no NaN comes."""
    logits, original = logits_of(4).astype(np.float32), logits_of(5).astype(np.float32)
    logits[:, 3:] = original[:, 3:] = -np.inf
    kept = TOP(original, k)
    np.testing.assert_array_equal(kept.log_others, -np.inf)
    function = lambda x: TO_CACHED(x, kept)
    np.testing.assert_allclose(function(logits), TO_REFERENCE(logits, original), rtol=1e-5, atol=1e-7)
    slope = gradient(function, logits)
    p, q = scipy.special.softmax(logits, -1), scipy.special.softmax(original, -1)
    np.testing.assert_allclose(slope, p - q, atol=1e-6)


def test_ids_that_are_none():
    logits = logits_of(6).astype(np.float32)
    kept = TOP(logits, 2)
    for bad in (-1, C):
        ids = np.asarray(kept.ids).copy()
        ids[1, 0] = bad
        values = TO_CACHED(logits, kept._replace(ids=ids))
        np.testing.assert_array_equal(np.isnan(values), [False, True, False, False])
        with pytest.raises(ValueError, match=r"reference.ids must lie in \[0, 6\)"):
            objectives.kl_to_cached_reference(logits, kept._replace(ids=ids))


def test_what_does_not_count_leaves_no_trace():
    logits, mask = logits_of(7, (2, 3)).astype(np.float32), np.array([[True, False, True], [False] * 3])
    kept = TOP(logits_of(8, (2, 3)).astype(np.float32), 2)
    expected = TO_CACHED(logits[:1, ::2], jax.tree.map(lambda x: x[:1, ::2], kept))
    logits[~mask] = np.nan
    bad = objectives.TopLogProbabilities(
        np.where(mask[..., None], kept.ids, -7),
        np.where(mask[..., None], kept.log_p, np.nan),
        np.where(mask, kept.log_others, np.nan),
    )
    values = TO_CACHED(logits, bad, mask)
    np.testing.assert_allclose(values, [expected[0], np.nan], rtol=1e-5)
    mean = lambda x: objectives.masked_mean(TO_CACHED(x, bad, mask), mask.any(-1)).total
    slope = gradient(mean, logits)
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(np.any(slope != 0, -1), mask)


# Values of all rows


class Model(NamedTuple):
    w: jax.Array


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_every_row_has_its_value(batch_size):
    """Of a pytree of rows, in their order, in the function's own structure; compiled once."""
    rng = np.random.default_rng(0)
    rows = {"x": rng.normal(size=(7, 3)).astype(np.float32), "y": jnp.arange(7), "none": None}
    params, shapes = Model(jnp.ones((3, 2))), []

    def function(params, rows):
        shapes.append(rows["x"].shape)
        return {"z": rows["x"] @ params.w, "more": (2 * rows["y"], rows["x"].astype(jnp.bfloat16))}

    found = objectives.reference_values(function, params, rows, batch_size=batch_size)
    assert shapes == [(min(batch_size, 7), 3)]
    assert all(isinstance(leaf, np.ndarray) and len(leaf) == 7 for leaf in jax.tree.leaves(found))
    np.testing.assert_allclose(found["z"], rows["x"] @ np.ones((3, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["more"][0], 2 * np.arange(7))
    assert found["more"][1].dtype == jnp.bfloat16


def test_references_of_npo_and_of_the_cache():
    """At the original itself NPO is 2 log(2) / beta, and the divergence from the cache is 0."""
    rng = np.random.default_rng(1)
    params = jnp.asarray(rng.normal(size=(5, C)), jnp.float32)
    mask = np.arange(4) < rng.integers(1, 5, 6)[:, None]
    rows = {"x": rng.normal(size=(6, 4, 5)).astype(np.float32), "y": rng.integers(0, C, (6, 4)), "mask": mask}

    def values(params, rows):
        z = rows["x"] @ params
        log_p = objectives.sequence_log_probability(z, rows["y"], rows["mask"])
        keep = functools.partial(objectives.top_log_probabilities, k=2)
        chunked = objectives.by_token(keep, rows["x"], lambda h: h @ params, chunk=3)
        return log_p, chunked

    log_p, kept = objectives.reference_values(values, params, rows, batch_size=4)
    now, _ = jax.jit(values)(params, rows)
    np.testing.assert_allclose(objectives.npo(now, log_p), 20 * np.log(2), rtol=1e-5)
    kl = TO_CACHED(rows["x"] @ params, kept, mask)
    np.testing.assert_allclose(kl, 0, atol=1e-6)


ROWS = {"x": np.zeros((4, 2)), "y": np.zeros(4)}
LOGITS = np.zeros((2, C))
KEPT = objectives.TopLogProbabilities(np.zeros((2, 3), int), np.zeros((2, 3)), np.zeros(2))
values_of = lambda rows, function=lambda params, rows: rows, **settings: objectives.reference_values(
    function, jnp.zeros(2), rows, **settings
)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: values_of(np.zeros((0, 2))), ValueError, "rows is empty"),
        (lambda: values_of({}), ValueError, "rows must be arrays with one leading axis"),
        (lambda: values_of({**ROWS, "z": np.zeros(3)}), ValueError, r"leading axis.*\(3,\)"),
        (lambda: values_of({**ROWS, "z": 1.0}), ValueError, "leading axis"),
        (lambda: values_of(ROWS, batch_size=0), ValueError, "batch_size must be >= 1, got 0"),
        (lambda: values_of(ROWS, batch_size=2.0), TypeError, "float"),
        (
            lambda: values_of(ROWS, lambda params, rows: rows["x"].mean(), batch_size=3),
            ValueError,
            r"function must return a value for each row.* 3 it returned the shapes \[\(\)\]",
        ),
        (
            lambda: values_of(ROWS, lambda params, rows: (rows["x"], params), batch_size=3),
            ValueError,
            r"function must return.*\(3, 2\), \(2,\)",
        ),
        (
            lambda: objectives.top_log_probabilities(LOGITS, 0),
            ValueError,
            r"k must lie in \[1, 6\]",
        ),
        (lambda: objectives.top_log_probabilities(LOGITS, 7), ValueError, "k must lie.*got 7"),
        (lambda: objectives.top_log_probabilities(LOGITS, 1.5), TypeError, "float"),
        (lambda: objectives.top_log_probabilities(np.zeros(2, int), 1), TypeError, "logits must be floating"),
        (
            lambda: objectives.kl_to_cached_reference(LOGITS, KEPT._replace(ids=np.zeros(2, int))),
            ValueError,
            "reference.ids must have the shape",
        ),
        (
            lambda: objectives.kl_to_cached_reference(LOGITS, KEPT._replace(log_p=np.zeros((2, 2)))),
            ValueError,
            r"reference.log_p must have the shape \(2, 3\)",
        ),
        (
            lambda: objectives.kl_to_cached_reference(LOGITS, KEPT._replace(log_others=np.zeros(3))),
            ValueError,
            r"reference.log_others must have the shape \(2,\)",
        ),
        (
            lambda: objectives.kl_to_cached_reference(LOGITS, KEPT._replace(ids=np.zeros((2, 3)))),
            TypeError,
            "reference.ids must be integers",
        ),
        (
            lambda: objectives.kl_to_cached_reference(LOGITS, KEPT, np.ones(3, bool)),
            ValueError,
            "mask must have",
        ),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match) as raised:
        call()
    assert len(str(raised.value)) < 600
