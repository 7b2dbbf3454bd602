"""The decoders: float64 against a straight line of NumPy, what is computed in parts, adapters, generation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.shared.models import sharding
from experiments.shared.models.llama import model
from experiments.shared.models.llama.config import (
    ATTENTION,
    FEED_FORWARD,
    Config,
    RopeScaling,
    projection_shapes,
)
from experiments.shared.models.llama.generate import generate, padded
from experiments.shared.models.llama.model import (
    Compute,
    hidden_states,
    initial_params,
    map_logits,
    param_shapes,
    token_log_probs,
)
from experiments.shared.models.llama.rope import frequencies
from experiments.shared.models.lora import Adapter, initial_weights, merged
from tests.llamas import FAMILIES, PLAIN, random_params, random_tokens, random_weights
from tests.representatives import slow_unless

ALL = (*ATTENTION, *FEED_FORWARD)
logits = jax.jit(model.logits, static_argnums=0)


def straight_line(config: Config, params, tokens):
    """Logits [T, V] of one text, in float64: loops over layers, heads and tokens, as the papers write it."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2) + config.rms_norm_eps) * weight

    def linear(weights, layer, x):
        return weights["weight"][layer] @ x + (weights["bias"][layer] if "bias" in weights else 0)

    def turned(x, position):
        half, y = config.head_dim // 2, np.empty_like(x)
        for i in range(half):
            rate = config.rope_theta ** (-2 * i / config.head_dim)
            if s := config.rope_scaling:
                wavelength = 2 * math.pi / rate
                longest = s.original_max_position_embeddings / s.low_freq_factor
                shortest = s.original_max_position_embeddings / s.high_freq_factor
                blend = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                if wavelength > longest:
                    rate /= s.factor
                elif wavelength >= shortest:
                    rate = (1 - blend) * rate / s.factor + blend * rate
            z = complex(x[i], x[i + half]) * np.exp(1j * position * rate)
            y[i], y[i + half] = z.real, z.imag
        return y

    x = [p["embed_tokens"]["weight"][token] for token in tokens]
    a, m, heads = p["layers"]["self_attn"], p["layers"]["mlp"], config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        normed = [norm(v, p["layers"]["input_layernorm"]["weight"][layer]) for v in x]
        split = lambda name, x=normed, i=layer: [
            linear(a[name], i, v).reshape(-1, config.head_dim) for v in x
        ]
        queries, keys, values = split("q_proj"), split("k_proj"), split("v_proj")
        if config.qk_norm:
            queries = [[norm(h, a["q_norm"]["weight"][layer]) for h in q] for q in queries]
            keys = [[norm(h, a["k_norm"]["weight"][layer]) for h in k] for k in keys]
        for t in range(len(x)):
            mixed = []
            for head in range(heads):
                shared = head // (heads // config.num_key_value_heads)
                query = turned(queries[t][head], t)
                scores = [query @ turned(keys[s][shared], s) for s in range(t + 1)]
                weights = np.exp(np.array(scores) / math.sqrt(config.head_dim))
                seen = np.array([values[s][shared] for s in range(t + 1)])
                mixed.append(weights / weights.sum() @ seen)
            x[t] = x[t] + linear(a["o_proj"], layer, np.concatenate(mixed))
        for t in range(len(x)):
            y = norm(x[t], p["layers"]["post_attention_layernorm"]["weight"][layer])
            gate = linear(m["gate_proj"], layer, y)
            y = gate / (1 + np.exp(-gate)) * linear(m["up_proj"], layer, y)
            x[t] = x[t] + linear(m["down_proj"], layer, y)
    head = p.get("lm_head", p["embed_tokens"])["weight"]
    return np.array([head @ norm(v, p["norm"]["weight"]) for v in x])


@pytest.mark.parametrize("family", slow_unless(["Llama 3", "biases", "Qwen3"], FAMILIES))
def test_logits_in_float64(family, x64):
    config = FAMILIES[family]
    params, tokens = random_params(config, jnp.float64), random_tokens(config, 2, 12)
    found = logits(config, params, tokens)
    assert found.dtype == jnp.float64
    expected = [straight_line(config, params, row) for row in np.asarray(tokens)]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_frequencies_of_llama_3():
    """The figures of Llama-3.2-1B: short wavelengths stay, long ones are 32 times as long."""
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(PLAIN, head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    scaled, plain = frequencies(config), frequencies(dataclasses.replace(config, rope_scaling=None))
    wavelength = 2 * np.pi / plain
    ratio = plain / scaled
    assert (ratio[wavelength < 8192 / 4] == 1).all()
    np.testing.assert_allclose(ratio[wavelength > 8192], 32, rtol=1e-12)
    assert (np.diff(ratio) >= 0).all()
    assert ((ratio > 1) & (ratio < 32)).any()


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_attention_heads"):
        dataclasses.replace(PLAIN, num_key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim"):
        dataclasses.replace(PLAIN, head_dim=7)


# What is computed in parts


def mean_loss(config, params, tokens, compute, chunk):
    return -jnp.mean(token_log_probs(config, params, tokens[:, :-1], tokens[:, 1:], (), compute, chunk))


@pytest.mark.parametrize("chunk", slow_unless([5], [4, 5, 12, 64]))
def test_log_probs_in_chunks(chunk, x64):
    params, tokens = random_params(PLAIN, jnp.float64), random_tokens(PLAIN, 2, 13)

    def whole(params):
        log_p = jax.nn.log_softmax(model.logits(PLAIN, params, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1))

    expected, expected_grads = jax.jit(jax.value_and_grad(whole))(params)
    # To lay out the layers takes long to compile.
    compute = Compute(remat=True, query_chunk=4, unroll=chunk == 64)
    loss = lambda params: mean_loss(PLAIN, params, tokens, compute, chunk)
    found, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), grads, expected_grads)


@pytest.mark.slow
def test_no_logits_of_all_tokens_exist():
    config = dataclasses.replace(PLAIN, vocab_size=32768)
    params, tokens = param_shapes(config), jax.ShapeDtypeStruct((2, 65), jnp.int32)

    def temporary(chunk):
        loss = lambda params, tokens: mean_loss(config, params, tokens, Compute(), chunk)
        return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporary(64) > 2 * 64 * 32768 * 4
    assert temporary(8) < temporary(64) / 2


@pytest.mark.slow
def test_remat_keeps_less():
    config = dataclasses.replace(PLAIN, num_hidden_layers=12)
    params, tokens = param_shapes(config), jax.ShapeDtypeStruct((4, 65), jnp.int32)

    def temporary(remat):
        loss = lambda params, tokens: mean_loss(config, params, tokens, Compute(remat), 64)
        return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) < temporary(False) / 3


def test_a_chunk_that_does_not_divide_the_queries_is_refused():
    with pytest.raises(ValueError, match="query_chunk"):
        model.logits(PLAIN, random_params(PLAIN), random_tokens(PLAIN, 1, 5), (), Compute(query_chunk=2))


def test_targets_outside_the_vocabulary_count_nothing():
    params, tokens = random_params(PLAIN), random_tokens(PLAIN, 1, 6)
    targets = tokens.at[0, 3].set(-100).at[0, 4].set(PLAIN.vocab_size)
    found = jax.jit(token_log_probs, static_argnums=0)(PLAIN, params, tokens, targets)[0]
    assert (np.asarray(found) == 0).tolist() == [False, False, False, True, True, False]


@pytest.mark.slow
def test_map_logits_gives_greedy_hits():
    params, tokens = random_params(PLAIN), random_tokens(PLAIN, 2, 7)

    @jax.jit
    def hits(params):
        hidden = hidden_states(PLAIN, params, tokens)
        return map_logits(lambda z, y: z.argmax(-1) == y, params, hidden, tokens, chunk=3)

    np.testing.assert_array_equal(hits(params), logits(PLAIN, params, tokens).argmax(-1) == tokens)


@pytest.mark.slow
def test_later_tokens_do_not_change_earlier_ones():
    params, tokens = random_params(PLAIN), random_tokens(PLAIN, 1, 8)
    found = logits(PLAIN, params, tokens), logits(PLAIN, params, tokens.at[0, 5].add(1) % PLAIN.vocab_size)
    same = np.all(found[0] == found[1], -1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_bfloat16_stays_bfloat16():
    params, tokens = param_shapes(FAMILIES["biases"], jnp.bfloat16), jnp.zeros((1, 8), jnp.int32)
    shape = lambda function: jax.eval_shape(lambda p: function(FAMILIES["biases"], p, tokens), params)
    assert shape(hidden_states).dtype == jnp.bfloat16
    assert shape(model.logits).dtype == jnp.float32


@pytest.mark.slow
def test_bfloat16_is_near():
    config = FAMILIES["Qwen2"]
    params, tokens = random_params(config, jnp.bfloat16), random_tokens(config, 1, 8)
    exact = logits(config, jax.tree.map(lambda x: x.astype(jnp.float32), params), tokens)
    np.testing.assert_allclose(logits(config, params, tokens), exact, atol=0.15)


# Meshes


def test_specs_split_every_matrix_over_both_axes():
    shapes = param_shapes(FAMILIES["biases"])
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    for path, leaf in flat:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        split = {axis for axis in sharding.spec(name) if axis}
        matrix = name.endswith("weight") and "norm" not in name
        assert split == {"fsdp", "tensor"} if matrix else split <= {"tensor"}, name
        assert len(sharding.spec(name)) in (0, leaf.ndim), name
    assert sharding.spec("layers.self_attn.o_proj.weight") == P(None, "fsdp", "tensor")
    assert sharding.spec("embed_tokens.weight") == P("tensor", "fsdp")
    assert sharding.spec("lora.q_proj.down") == P()


@pytest.mark.parametrize("axes", slow_unless(["fsdp tensor"], ["fsdp tensor", "tensor", "data"]))
def test_a_mesh_changes_nothing(axes, x64):
    axes = tuple(axes.split())
    config = dataclasses.replace(PLAIN, vocab_size=64, tie_word_embeddings=True)
    params, tokens = random_params(config, jnp.float64), random_tokens(config, 4, 9)
    loss = jax.jit(jax.value_and_grad(lambda p, t: mean_loss(config, p, t, Compute(True, 4), 4)))
    expected, expected_grads = loss(params, tokens)
    shape = (2, 2) if len(axes) == 2 else (2,)
    mesh = jax.make_mesh(shape, axes, (AxisType.Auto,) * len(axes), devices=jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh):
        found, grads = loss(jax.device_put(params, sharding.shardings(params, mesh)), tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), grads, expected_grads)
    if axes == ("fsdp", "tensor"):
        assert grads["layers"]["mlp"]["up_proj"]["weight"].sharding.spec == P(None, "tensor", "fsdp")


# Adapters


@pytest.mark.slow
def test_new_adapters_change_nothing():
    params, tokens = random_params(PLAIN), random_tokens(PLAIN, 1, 5)
    new = lambda names: initial_weights(
        projection_shapes(PLAIN), PLAIN.num_hidden_layers, jax.random.key(0), 2, names
    )
    adapter = Adapter(2.0, new(ALL))
    found = logits(PLAIN, params, tokens, [adapter])
    np.testing.assert_array_equal(found, logits(PLAIN, params, tokens))
    with pytest.raises(ValueError, match="query"):
        new(["query"])


@pytest.mark.parametrize("family", slow_unless(["Qwen3"], ["biases", "Qwen3"]))
def test_merged_is_unmerged(family, x64):
    config = FAMILIES[family]
    params, tokens = random_params(config, jnp.float64), random_tokens(config, 2, 6)
    several = [
        Adapter(0.7, random_weights(config, ALL, 3, jnp.float64)),
        Adapter(-1.3, random_weights(config, ("q_proj", "down_proj"), 1, jnp.float64, seed=9)),
    ]
    found = logits(config, params, tokens, several)
    assert np.abs(found - logits(config, params, tokens, several[:1])).max() > 1e-3
    np.testing.assert_allclose(found, logits(config, merged(params, several), tokens), rtol=1e-10, atol=1e-10)
    # One after the other is both at once.
    twice = merged(merged(params, several[:1]), several[1:])
    np.testing.assert_allclose(found, logits(config, twice, tokens), rtol=1e-10, atol=1e-10)


def test_an_adapter_is_its_product():
    """W + s B A, written out for one layer's projection."""
    params = random_params(PLAIN)
    adapter = Adapter(0.5, random_weights(PLAIN, ["up_proj"]))
    found = merged(params, [adapter])
    down, up = adapter.weights["up_proj"]
    before, after = (p["layers"]["mlp"]["up_proj"]["weight"][1] for p in (params, found))
    np.testing.assert_allclose(after - before, 0.5 * up[1] @ down[1], atol=1e-6)
    others = [tree["layers"]["mlp"]["gate_proj"]["weight"] for tree in (params, found)]
    np.testing.assert_array_equal(*others)


@pytest.mark.slow
def test_gradients_reach_adapters_alone():
    params, tokens = random_params(PLAIN), random_tokens(PLAIN, 1, 6)
    weights = random_weights(PLAIN, ALL)
    loss = lambda weights: model.logits(PLAIN, params, tokens, [Adapter(1.0, weights)]).std()
    grads = jax.jit(jax.grad(loss))(weights)
    assert jax.tree.structure(grads) == jax.tree.structure(weights)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


# Generation

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
NEW = 8


def slow_greedy(config, params, prompt, new, adapters=()):
    """The argmax of the whole text, over and over."""
    text = list(prompt)
    for _ in range(new):
        # Of one length, so that it is compiled once: what comes later changes nothing.
        row = np.array([text + [0] * (len(prompt) + new - len(text))])
        text.append(int(logits(config, params, row, adapters)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("family", slow_unless(["Llama 3"], ["Llama 3", "Qwen3 with biases"]))
def test_cached_greedy_is_uncached(family):
    config = FAMILIES[family]
    params = random_params(config)
    adapters = [Adapter(0.5, random_weights(config, ALL))]
    found = generate(config, params, padded(PROMPTS), NEW, adapters=adapters)
    expected = [slow_greedy(config, params, prompt, NEW, adapters) for prompt in PROMPTS]
    assert found.tokens.tolist() == expected
    assert found.length.tolist() == [NEW] * 3


@pytest.mark.parametrize(
    ("sampled", "row"), slow_unless([(True, 1)], [(True, 0), (True, 1), (True, 2), (False, 1)])
)
def test_a_batch_is_its_texts_one_by_one(sampled, row):
    """Alone there is no padding, which changes neither what is seen nor what is drawn."""
    params = random_params(PLAIN)
    keys = jax.random.split(jax.random.key(5), 3) if sampled else None
    whole = generate(PLAIN, params, padded(PROMPTS), NEW, keys=keys, temperature=2.0).tokens
    own = None if keys is None else keys[row : row + 1]
    alone = generate(PLAIN, params, padded(PROMPTS[row : row + 1]), NEW, keys=own, temperature=2.0).tokens
    assert alone[0].tolist() == whole[row].tolist()
    assert len({tuple(tokens) for tokens in whole.tolist()}) == 3


@pytest.mark.slow
def test_sampling_draws_from_the_distribution():
    params, count, temperature = random_params(PLAIN), 4000, 0.3
    prompts = padded([PROMPTS[0]] * count)
    keys = jax.random.split(jax.random.key(0), count)
    drawn = generate(PLAIN, params, prompts, 1, keys=keys, temperature=temperature).tokens[:, 0]
    z = logits(PLAIN, params, np.array(PROMPTS[:1]))[0, -1]
    p = np.asarray(jax.nn.softmax(z / temperature))
    share = np.bincount(drawn, minlength=PLAIN.vocab_size) / count
    assert np.abs(share - p).max() < 5 * math.sqrt(0.25 / count)
    assert np.abs(np.asarray(jax.nn.softmax(z)) - p).max() > 10 * math.sqrt(0.25 / count)


def test_a_text_ends_before_its_stop():
    params = random_params(PLAIN)
    free = generate(PLAIN, params, padded(PROMPTS), NEW).tokens.tolist()
    stop = (free[0][3], free[1][1], free[2][2])
    found = generate(PLAIN, params, padded(PROMPTS), NEW, stop)
    for row, tokens in enumerate(free):
        length = next((i for i, token in enumerate(tokens) if token in stop), NEW)
        assert found.length[row] == length
        expected = tokens if length == NEW else tokens[:length] + [tokens[length]] * (NEW - length)
        assert found.tokens[row].tolist() == expected
    assert max(found.length.tolist()) < NEW


@pytest.mark.slow
def test_all_texts_may_end_at_once():
    params = random_params(PLAIN)
    stop = tuple(range(PLAIN.vocab_size))
    found = generate(PLAIN, params, padded(PROMPTS), NEW, stop)
    assert found.length.tolist() == [0, 0, 0]


def test_prompts_of_one_shape_compile_once():
    params = random_params(PLAIN)
    generate.clear_cache()
    for prompts in ([[1, 2, 3], [4]], [[5], [6, 7]]):
        generate(PLAIN, params, padded(prompts, 3), 2, (2,))
    assert generate._cache_size() == 1


def test_prompts_must_fit():
    with pytest.raises(ValueError, match=r"\[2, 0\]"):
        padded([[1, 2], []])
    with pytest.raises(ValueError, match="1 to 1"):
        padded([[1, 2]], 1)


@pytest.mark.slow
def test_initial_params_have_the_shapes_that_are_told():
    config = FAMILIES["biases"]
    params = initial_params(config, jax.random.key(0), jnp.bfloat16)
    shapes = param_shapes(config, jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    # Layers are drawn each for itself.
    weights = params["layers"]["mlp"]["up_proj"]["weight"]
    assert not np.array_equal(weights[0], weights[1])
