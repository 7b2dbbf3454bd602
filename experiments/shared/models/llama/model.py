"""The decoder: NNX modules under Hugging Face's names, and pure functions of a tree of parameters.

The parameters are a nested dict, in which every array of a layer has a leading axis of layers:
`params["layers"]["self_attn"]["q_proj"]["weight"]` is [layers, outputs, inputs].
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.objectives import by_token
from experiments.shared.models.linear import Linear
from experiments.shared.models.llama.config import Config
from experiments.shared.models.llama.rope import frequencies, rotated
from experiments.shared.models.lora import Adapter
from experiments.shared.models.sharding import FSDP, MATRICES, TENSOR, constrain, gathered

Params = dict[str, Any]


class Compute(NamedTuple):
    """How the same function is computed.

    Attributes:
      remat: recompute each layer in the backward pass: one [B, T, hidden_size] per layer is kept.
      query_chunk: attention scores exist for so many queries at a time; None for all T, which it must divide.
      unroll: lay the layers one after the other in the program, for cost analyses that count a loop once.
    """

    remat: bool = False
    query_chunk: int | None = None
    unroll: bool = False


PLAIN = Compute()


class Cache(NamedTuple):
    """Keys and values of earlier tokens, [layers, B, slots, key-value heads, head_dim] each."""

    key: jax.Array
    value: jax.Array


class Slots(NamedTuple):
    """Where tokens stand: `at` [T]; the text of row b begins at slot first[b], and all before is padding.

    Slots serve as positions: the rotation makes scores depend on differences only.
    """

    at: jax.Array
    first: jax.Array


def wide(dtype: Any) -> Any:
    """float32 at least: norms, softmaxes and losses are not taken in bfloat16."""
    return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, eps: float, dtype: Any):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(wide(x.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.weight[...]


class Embedding(nnx.Module):
    """A vector for each word, [vocab_size, hidden_size]; also the head, whose rows are the words', too."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        shape = config.vocab_size, config.hidden_size
        self.weight = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) / config.hidden_size**0.5)


class Attention(nnx.Module):
    """Causal attention, in which num_attention_heads / num_key_value_heads queries share a key and value."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        size, width = config.hidden_size, config.head_dim
        queries, pairs = config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj = Linear("q_proj", size, queries, config.qkv_bias, dtype, rngs)
        self.k_proj = Linear("k_proj", size, pairs, config.qkv_bias, dtype, rngs)
        self.v_proj = Linear("v_proj", size, pairs, config.qkv_bias, dtype, rngs)
        self.o_proj = Linear("o_proj", queries, size, config.o_bias, dtype, rngs)
        self.q_norm = RMSNorm(width, config.rms_norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.rms_norm_eps, dtype) if config.qk_norm else None
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        slots: Slots,
        adapters: Sequence[Adapter],
        cache: Cache | None,
        query_chunk: int | None,
    ) -> tuple[jax.Array, Cache | None]:
        def heads(y: jax.Array) -> jax.Array:
            y = constrain(y, FSDP, None, TENSOR)
            return constrain(y.reshape(*y.shape[:2], -1, self.config.head_dim), FSDP, None, TENSOR, None)

        query, key, value = (heads(p(x, adapters)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        turned = partial(rotated, positions=slots.at, frequencies=frequencies(self.config))
        query, key = turned(query), turned(key)
        if cache is not None:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slots.at[0], axis=1)
            cache = Cache(write(cache.key, key), write(cache.value, value))
            key, value = cache
        y = attend(query, key, value, slots, query_chunk)
        y = constrain(y.reshape(*y.shape[:2], -1), FSDP, None, TENSOR)
        return self.o_proj(y, adapters), cache


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, slots: Slots, query_chunk: int | None
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the slots from a row's first to the query's own.

    query [B, T, H, D] stands at slots.at; key and value [B, S, K, D] fill the slots 0 to S - 1. With a
    query_chunk, the scores of one chunk exist at a time, and are recomputed for the gradient.
    """
    batch, length, _, width = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, width)
    query = constrain(query, FSDP, None, TENSOR, None, None)
    slot = jnp.arange(key.shape[1])

    def part(query, at):
        precise = wide(query.dtype)
        scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=precise) / width**0.5
        visible = (slot >= slots.first[:, None, None]) & (slot <= at[:, None])
        # Not -inf: a query in the padding sees nothing, and its NaN would spread to the gradient.
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(precise).min)
        return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores).astype(value.dtype), value)

    if query_chunk is None:
        y = part(query, slots.at)
    elif length % query_chunk:
        raise ValueError(f"query_chunk must divide the number of tokens, {length}, got {query_chunk}")
    else:
        parts = in_chunks(query, query_chunk), slots.at.reshape(-1, query_chunk)
        y = jax.lax.map(jax.checkpoint(lambda pair: part(*pair)), parts)
        y = jnp.moveaxis(y, 0, 1)
    return y.reshape(batch, length, -1, width)


def in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] as [T / chunk, B, chunk, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        size, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear("gate_proj", size, hidden, bias, dtype, rngs)
        self.up_proj = Linear("up_proj", size, hidden, bias, dtype, rngs)
        self.down_proj = Linear("down_proj", hidden, size, bias, dtype, rngs)

    def __call__(self, x: jax.Array, adapters: Sequence[Adapter]) -> jax.Array:
        gate, up = (constrain(p(x, adapters), FSDP, None, TENSOR) for p in (self.gate_proj, self.up_proj))
        return self.down_proj(jax.nn.silu(gate) * up, adapters)


class Layer(nnx.Module):
    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        slots: Slots,
        adapters: Sequence[Adapter],
        cache: Cache | None,
        query_chunk: int | None,
    ) -> tuple[jax.Array, Cache | None]:
        # What is kept for the backward pass, one x a layer, is split over both axes.
        x = constrain(x, FSDP, TENSOR, None)
        y = constrain(self.input_layernorm(x), FSDP, None, None)
        y, cache = self.self_attn(y, slots, adapters, cache, query_chunk)
        x = x + constrain(y, FSDP, TENSOR, None)
        y = constrain(self.post_attention_layernorm(x), FSDP, None, None)
        x = x + constrain(self.mlp(y, adapters), FSDP, TENSOR, None)
        return constrain(x, FSDP, TENSOR, None), cache


class Llama(nnx.Module):
    """Tokens to hidden states; `lm_head` is missing where the embedding serves as the head."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config, dtype, rngs)
        make = nnx.split_rngs(splits=config.num_hidden_layers)(
            nnx.vmap(lambda rngs: Layer(config, dtype, rngs))
        )
        self.layers = make(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = None if config.tie_word_embeddings else Embedding(config, dtype, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        slots: Slots,
        adapters: Sequence[Adapter] = (),
        cache: Cache | None = None,
        compute: Compute = PLAIN,
    ) -> tuple[jax.Array, Cache | None]:
        """Tokens [B, T] to hidden states [B, T, hidden_size] before the head, and the cache with these."""
        graph, layers = nnx.split(self.layers)

        def step(x, inputs):
            layer, weights, cache = inputs
            own = [adapter._replace(weights=w) for adapter, w in zip(adapters, weights, strict=True)]
            return nnx.merge(graph, layer)(x, slots, own, cache, compute.query_chunk)

        x = constrain(self.embed_tokens.weight[tokens], FSDP, TENSOR, None)
        step = jax.checkpoint(step) if compute.remat else step
        inputs = layers, [adapter.weights for adapter in adapters], cache
        x, cache = jax.lax.scan(step, x, inputs, unroll=compute.unroll)
        return constrain(self.norm(x), FSDP, None, None), cache


@cache
def graph(config: Config) -> nnx.GraphDef[Llama]:
    return nnx.graphdef(nnx.eval_shape(lambda: Llama(config, jnp.float32, nnx.Rngs(params=0))))


def initial_params(config: Config, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Normal matrices of variance 1 / inputs, norms of 1, biases of 0."""
    return nnx.to_pure_dict(nnx.state(Llama(config, dtype, nnx.Rngs(params=key))))


def param_shapes(config: Config, dtype: Any = jnp.float32) -> Params:
    """The parameters as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: initial_params(config, jax.random.key(0), dtype))


def hidden_states(
    config: Config,
    params: Params,
    tokens: jax.Array,
    adapters: Sequence[Adapter] = (),
    compute: Compute = PLAIN,
) -> jax.Array:
    """[B, T, hidden_size] after the last norm, of tokens [B, T]; what follows a text may be anything."""
    slots = Slots(jnp.arange(tokens.shape[1]), jnp.zeros(1, jnp.int32))
    return nnx.merge(graph(config), params)(tokens, slots, adapters, None, compute)[0]


def project(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [..., vocab_size], in float32 at least, of hidden states [..., hidden_size]."""
    head = params.get("lm_head", params["embed_tokens"])["weight"]
    head = gathered(head, MATRICES["lm_head"])
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=wide(hidden.dtype))


def logits(
    config: Config,
    params: Params,
    tokens: jax.Array,
    adapters: Sequence[Adapter] = (),
    compute: Compute = PLAIN,
) -> jax.Array:
    """[B, T, vocab_size]: logits[:, t] predict tokens[:, t + 1]."""
    return project(params, hidden_states(config, params, tokens, adapters, compute))


def map_logits(
    function: Callable[..., Any],
    params: Params,
    hidden: jax.Array,
    *arrays: jax.Array,
    mask: jax.Array | None = None,
    chunk: int,
) -> Any:
    """`by_token` with this model's head: function(logits [n, V], *arrays [n]) of all tokens, [B, T]."""
    head = lambda hidden: constrain(project(params, hidden), FSDP, TENSOR)
    return by_token(function, hidden, head, *arrays, mask=mask, chunk=chunk)


def token_log_probs(
    config: Config,
    params: Params,
    tokens: jax.Array,
    targets: jax.Array,
    adapters: Sequence[Adapter] = (),
    compute: Compute = PLAIN,
    chunk: int = 256,
) -> jax.Array:
    """log p(targets[:, t] | tokens[:, :t + 1]), [B, T] in nats; a target outside the vocabulary gives 0."""

    def of_target(z, targets):
        # Not a gather: a sum stays where the vocabulary is split, and its gradient scatters nothing.
        is_target = targets[..., None] == jnp.arange(z.shape[-1])
        picked = jnp.sum(jnp.where(is_target, z, 0), -1)
        return jnp.where(is_target.any(-1), picked - jax.nn.logsumexp(z, -1), 0)

    hidden = hidden_states(config, params, tokens, adapters, compute)
    return map_logits(of_target, params, hidden, targets, chunk=chunk)
