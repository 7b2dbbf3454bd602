"""Objectives in chunks of tokens: the same values and gradients, and no logits of all tokens."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu
from eupmu_jax import objectives
from tests.representatives import slow_unless

B, T, D, V = 2, 7, 3, 5
by_token = objectives.by_token
TOP = jax.jit(objectives.top_log_probabilities, static_argnums=1)


def texts(seed=0, shape=(B, T), dtype=np.float64):
    rng = np.random.default_rng(seed)
    hidden, embedding = rng.normal(size=(*shape, D)), rng.normal(size=(V, D))
    return hidden.astype(dtype), embedding.astype(dtype), rng.integers(0, V, shape).astype(np.int32)


def arrays_of(objective):
    """What each objective takes beside logits, of every token."""
    rng, labels = np.random.default_rng(1), texts()[2]
    values, logits = rng.normal(size=(B, T)), rng.normal(size=(B, T, V))
    return {
        objectives.kl_to_uniform: (),
        objectives.kl_to_reference: (logits,),
        objectives.kl_to_cached_reference: (
            jax.jit(objectives.top_log_probabilities, static_argnums=1)(logits, 2),
        ),
        objectives.confidence_target: (labels, values, logits),
    }.get(objective, (labels,))


OBJECTIVES = {
    each.__name__: each
    for each in (
        objectives.cross_entropy,
        objectives.unlikelihood,
        objectives.gradient_ascent,
        objectives.confidence,
        objectives.confidence_target,
        objectives.kl_to_uniform,
        objectives.kl_to_reference,
        objectives.kl_to_cached_reference,
    )
}

REPRESENTATIVES = ["unlikelihood", "confidence_target", "kl_to_cached_reference"]


def whole(objective, hidden, head, *arrays, mask=None):
    """The same with the logits of all tokens at once."""
    one = lambda x: jnp.asarray(x).reshape(-1, *jnp.shape(x)[2:])
    given = {} if mask is None else {"mask": one(mask)}
    values = objective(head(one(hidden)), *jax.tree.map(one, arrays), **given)
    return values.reshape(hidden.shape[:2])


def both(way, objective, hidden, embedding, *arrays, mask=None, **settings):
    """Values, and gradients of their counted sum with respect to hidden states and head, compiled."""

    @jax.jit
    def function(hidden, embedding):
        values = way(objective, hidden, lambda h: h @ embedding.T, *arrays, mask=mask, **settings)
        return jnp.sum(values, where=mask), values

    (_, values), grads = jax.value_and_grad(function, (0, 1), has_aux=True)(hidden, embedding)
    return values, grads


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", slow_unless(REPRESENTATIVES, OBJECTIVES))
def test_chunks_change_nothing(name):
    objective = OBJECTIVES[name]
    (hidden, embedding, _), arrays = texts(), arrays_of(objective)
    mask = np.random.default_rng(2).random((B, T)) < 0.6
    expected = both(whole, objective, hidden, embedding, *arrays, mask=mask)
    found = both(by_token, objective, hidden, embedding, *arrays, mask=mask, chunk=3)
    np.testing.assert_array_equal(np.isnan(found[0]), ~mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), found, expected)


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10**6))
def test_any_length_and_chunk(length, chunk, seed):
    """Every value stands where its token does: no objective, but what the head and the arrays see."""
    hidden, embedding, labels = texts(seed, (B, length))
    each = lambda logits, labels: logits[:, 0] + 100 * labels
    found = by_token(each, hidden, lambda h: h @ embedding.T, labels, chunk=chunk)
    np.testing.assert_allclose(found, hidden @ embedding[0] + 100 * labels, rtol=1e-12)


@pytest.mark.parametrize("name", slow_unless(REPRESENTATIVES, OBJECTIVES))
def test_what_does_not_count_leaves_no_trace(name):
    """NaN in hidden states and arrays, in the middle and at the end, where chunks are filled up."""
    objective = OBJECTIVES[name]
    hidden, embedding, _ = texts(dtype=np.float32)
    mask = np.array([[1, 1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]], bool)

    def spoiled(x):
        x = np.array(x)
        x[~mask] = np.nan if np.issubdtype(x.dtype, np.floating) else -100
        return x

    arrays = arrays_of(objective)
    expected, expected_grads = both(whole, objective, hidden, embedding, *arrays, mask=mask)
    bad = jax.tree.map(spoiled, arrays)
    values, grads = both(by_token, objective, spoiled(hidden), embedding, *bad, mask=mask, chunk=4)
    np.testing.assert_allclose(values[mask], expected[mask], rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(grads[0][~mask], 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)


def test_heads_that_divide_by_the_norm():
    """Neither what is masked nor what fills up a chunk is a zero vector, whose direction is NaN."""
    hidden, embedding, labels = texts(dtype=np.float32)
    mask = np.arange(T) < np.array([[5], [4]])
    hidden[~mask] = 0

    def total(embedding):
        head = lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True) @ embedding.T
        values = by_token(objectives.cross_entropy, hidden, head, labels, mask=mask, chunk=4)
        return objectives.masked_mean(values, mask).total

    assert np.all(np.isfinite(jax.jit(jax.grad(total))(embedding)))


def test_a_label_that_is_none_is_nan_where_it_counts():
    hidden, embedding, labels = texts(dtype=np.float32)
    labels[0, 2], labels[1, 6] = -100, V
    function = lambda x: by_token(objectives.cross_entropy, x, lambda h: h @ embedding.T, labels, chunk=3)
    values = jax.jit(function)(hidden)
    np.testing.assert_array_equal(np.isnan(values), (labels < 0) | (labels >= V))


def test_pytrees_of_values_come_back_in_order():
    hidden, embedding, labels = texts(dtype=np.float32)
    head = lambda h: h @ embedding.T
    each = lambda z, y: {"hit": z.argmax(-1) == y, "best": jax.lax.top_k(z, 2)}
    found = by_token(each, hidden, head, labels, chunk=3)
    logits = hidden @ embedding.T
    np.testing.assert_array_equal(found["hit"], logits.argmax(-1) == labels)
    np.testing.assert_array_equal(found["best"][1], np.argsort(-logits, -1)[..., :2])
    kept = by_token(functools.partial(objectives.top_log_probabilities, k=2), hidden, head, chunk=2)
    expected = objectives.top_log_probabilities(logits, 2)
    assert isinstance(kept, objectives.TopLogProbabilities)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), kept, expected)


@pytest.mark.usefixtures("x64")
def test_sums_over_tokens_are_log_probabilities_of_texts():
    hidden, embedding, labels = texts()
    mask = np.arange(T) < np.array([[5], [3]])
    given = np.where(mask, labels, -100)

    def chunked(embedding):
        head = lambda h: h @ embedding.T
        values = by_token(objectives.gradient_ascent, hidden, head, given, mask=mask, chunk=2)
        return objectives.npo(jnp.sum(values, -1, where=mask), np.full(B, -9.0)).sum()

    def plain(embedding):
        log_p = objectives.sequence_log_probability(hidden @ embedding.T, labels, mask)
        return objectives.npo(log_p, np.full(B, -9.0)).sum()

    found, expected = (jax.jit(jax.value_and_grad(way))(embedding) for way in (chunked, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11), found, expected)


def test_chunks_are_even():
    """Of 9 tokens in chunks of up to 8, 10 are computed, not 16."""
    hidden, embedding, _ = texts(shape=(B, 9))
    seen = []

    def record(logits):
        seen.append(logits.shape)
        return logits[:, 0]

    by_token(record, hidden, lambda h: h @ embedding.T, chunk=8)
    assert set(seen) == {(B * 5, V)}


def temporary(length, vocabulary=8192, width=32, chunk=4, gradient=True):
    def loss(hidden, embedding, labels, mask):
        head = lambda h: h @ embedding.T
        values = by_token(objectives.unlikelihood, hidden, head, labels, mask=mask, chunk=chunk)
        mean = objectives.masked_mean(values, mask)
        return mean.total / mean.count

    shapes = (
        jax.ShapeDtypeStruct((B, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((B, length), jnp.int32),
        jax.ShapeDtypeStruct((B, length), bool),
    )
    function = jax.grad(loss, (0, 1)) if gradient else loss
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_no_logits_of_all_tokens_exist():
    short, long = temporary(8), temporary(256)
    # Hidden states are copied, whose width is 1 / 256 of the vocabulary.
    assert long - short < 4 * B * 256 * 32 * 4
    assert long < B * 256 * 8192 * 4 / 8
    # The measure does see what is there.
    assert temporary(256, chunk=256) > B * 256 * 8192 * 4


def test_tied_embeddings_are_not_copied():
    embedding = 8192 * 256 * 4
    assert temporary(8, width=256, gradient=False) < embedding / 4
    # One more of that size, to add up the gradient.
    assert temporary(8, width=256) < 1.5 * embedding


def test_rows_stay_on_their_devices():
    hidden, embedding, labels = texts(3, (8, T), np.float32)
    mask = np.arange(T) < np.arange(8)[:, None]

    def loss(embedding, hidden, labels, mask):
        head = lambda h: h @ embedding.T
        values = by_token(objectives.unlikelihood, hidden, head, labels, mask=mask, chunk=3)
        return objectives.masked_mean(values, mask).total

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    step = jax.jit(jax.value_and_grad(loss))
    split = [jax.device_put(x, NamedSharding(mesh, P("batch"))) for x in (hidden, labels, mask)]
    program = step.lower(jax.device_put(embedding, NamedSharding(mesh, P())), *split).compile()
    assert "all-gather" not in program.as_text()
    found = program(jax.device_put(embedding, NamedSharding(mesh, P())), *split)
    expected = step(embedding, hidden, labels, mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.usefixtures("strict")
def test_strict_promotion_and_bfloat16():
    hidden, embedding, labels = texts(dtype=np.float32)
    hidden, embedding = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(embedding, jnp.bfloat16)
    mask = jnp.asarray(labels > 0)
    head = lambda h: jnp.einsum("nd,vd->nv", h, embedding, preferred_element_type=jnp.float32)
    function = lambda hidden: by_token(objectives.unlikelihood, hidden, head, labels, mask=mask, chunk=2)
    found = jax.jit(function)(hidden)
    assert found.dtype == jnp.float32
    wide = hidden.astype(jnp.float32) @ embedding.astype(jnp.float32).T
    expected = objectives.unlikelihood(wide.reshape(-1, V), labels.ravel(), mask.ravel())
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5)


def test_a_few_steps_forget_tokens():
    """In `eupmu`: forget tokens of some texts while the original's top predictions hold on others."""
    hidden, embedding, labels = texts(5, (4, T), np.float32)
    mask = np.arange(T) < np.array([[7], [3], [5], [6]])
    keep = functools.partial(objectives.top_log_probabilities, k=2)
    original = by_token(keep, hidden[2:], lambda h: h @ embedding.T, chunk=3)

    def losses_fn(embedding, batch):
        head = lambda h: h @ embedding.T
        forget = by_token(
            objectives.unlikelihood, batch["x"][:2], head, batch["y"], mask=batch["mask"][:2], chunk=3
        )
        retain = by_token(
            objectives.kl_to_cached_reference,
            batch["x"][2:],
            head,
            original,
            mask=batch["mask"][2:],
            chunk=3,
        )
        means = (
            objectives.masked_mean(values, part)
            for values, part in ((forget, batch["mask"][:2]), (retain, batch["mask"][2:]))
        )
        return eu.Losses(*means)

    tx = eu.eupmu(losses_fn, optax.sgd(0.1), eu.Tolerance(0.01, measure="lagged"))
    step, params, state = eu.training_step(tx, jnp.asarray(embedding))
    batch, losses = {"x": hidden, "y": labels[:2], "mask": mask}, []
    for _ in range(10):
        params, state, info = step(params, state, batch)
        losses.append(float(info.forget_loss))
    assert losses[-1] < losses[0]
    assert int(eu.surgery_info(state).skipped_steps) == 0


HIDDEN, LABELS = np.zeros((B, T, D)), np.zeros((B, T), int)
HEAD = lambda h: h @ jnp.zeros((D, V))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: by_token(objectives.cross_entropy, HIDDEN[0], HEAD, LABELS),
            ValueError,
            r"hidden .*\(7, 3\)",
        ),
        (lambda: by_token(objectives.kl_to_uniform, HIDDEN[:, :0], HEAD), ValueError, "hidden .*T >= 1"),
        (
            lambda: by_token(objectives.cross_entropy, HIDDEN, HEAD, LABELS[:, 1:]),
            ValueError,
            r"arrays must.*\(2, 7\).*\(2, 6\)",
        ),
        (
            lambda: by_token(objectives.cross_entropy, HIDDEN, HEAD, LABELS, mask=LABELS > 0, chunk=0),
            ValueError,
            "chunk must be >= 1, got 0",
        ),
        (lambda: by_token(objectives.cross_entropy, HIDDEN, HEAD, LABELS, chunk=2.0), TypeError, "float"),
        (
            lambda: by_token(objectives.cross_entropy, HIDDEN, HEAD, LABELS, mask=LABELS[0] > 0),
            ValueError,
            r"mask must.*\(2, 7\).*\(7,\)",
        ),
        (
            lambda: by_token(objectives.cross_entropy, HIDDEN, HEAD, LABELS, mask=LABELS),
            TypeError,
            "mask must be boolean",
        ),
        (
            lambda: by_token(lambda z: z.mean(), HIDDEN, HEAD, chunk=3),
            ValueError,
            r"objective must return a value for each token.*n = 6 it returned the shape \(\)",
        ),
        (
            lambda: by_token(objectives.cross_entropy, HIDDEN, HEAD, LABELS * 1.0),
            TypeError,
            "labels must be integers",
        ),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match) as raised:
        call()
    assert len(str(raised.value)) < 600
