"""Greedy and sampled continuations of several texts at once, with a cache of keys and values."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.shared.models.llama.config import Config
from experiments.shared.models.llama.model import Cache, Params, Slots, graph, project
from experiments.shared.models.lora import Adapter


class Prompts(NamedTuple):
    """Texts that end together: row b of tokens [B, P] begins at first[b], after padding."""

    tokens: np.ndarray
    first: np.ndarray


class Generated(NamedTuple):
    """tokens [B, new]; row b ends after length[b] tokens, before one that stops it, and repeats that one."""

    tokens: jax.Array
    length: jax.Array


def padded(texts: Sequence[Sequence[int]], length: int | None = None) -> Prompts:
    """Prompts of tokenised texts, none empty, padded on the left to the longest or to that length."""
    longest = max(map(len, texts))
    length = longest if length is None else length
    if not all(map(len, texts)) or longest > length:
        raise ValueError(f"prompts must have 1 to {length} tokens, got {[len(text) for text in texts]}")
    rows = [[0] * (length - len(text)) + list(text) for text in texts]
    return Prompts(np.array(rows, np.int32), np.array([length - len(text) for text in texts], np.int32))


def empty_cache(config: Config, params: Params, batch: int, slots: int) -> Cache:
    shape = config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim
    empty = jnp.zeros(shape, params["embed_tokens"]["weight"].dtype)
    return Cache(empty, empty)


@partial(jax.jit, static_argnames=("config", "new", "stop"))
def generate(
    config: Config,
    params: Params,
    prompts: Prompts,
    new: int,
    stop: tuple[int, ...] = (),
    adapters: Sequence[Adapter] = (),
    keys: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
) -> Generated:
    """Up to `new` tokens after each prompt, each text as if it were alone.

    Args:
      config, params, adapters: the model.
      prompts: from `padded`. Another shape compiles again: pad to one length.
      new: how many tokens at most.
      stop: tokens that end a text, such as config.eos_token_ids.
      keys: a random key for each row to sample with; None for the most probable token.
      temperature: what the logits are divided by when sampling.
    """
    model, (batch, length) = nnx.merge(graph(config), params), prompts.tokens.shape
    first = jnp.asarray(prompts.first)

    def advance(tokens, start, cache):
        """The next token of each row after these, the first of which stands at that slot."""
        slots = Slots(start + jnp.arange(tokens.shape[1]), first)
        hidden, cache = model(tokens, slots, adapters, cache)
        z = project(params, hidden[:, -1])
        if keys is None:
            return jnp.argmax(z, -1).astype(jnp.int32), cache
        # A text's own position, so that padding does not change what is drawn.
        own = jax.vmap(jax.random.fold_in)(keys, slots.at[-1] - first)
        return jax.vmap(jax.random.categorical)(own, z / temperature).astype(jnp.int32), cache

    def stops(token):
        return jnp.isin(token, jnp.array(stop, jnp.int32))

    def unfinished(carry):
        count, token, *_ = carry
        return (count < new) & ~jnp.all(stops(token))

    def step(carry):
        count, token, out, cache = carry
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], count, 1)
        following, cache = advance(token[:, None], length + count, cache)
        return count + 1, jnp.where(stops(token), token, following), out, cache

    cache = empty_cache(config, params, batch, length + new)
    token, cache = advance(jnp.asarray(prompts.tokens), 0, cache)
    out = jnp.zeros((batch, new), jnp.int32)
    count, token, out, _ = jax.lax.while_loop(unfinished, step, (0, token, out, cache))
    # Where all texts ended early, the rest of each row is its last token.
    out = jnp.where(jnp.arange(new) < count, out, token[:, None])
    return Generated(out, jnp.sum(jnp.cumsum(stops(out), 1) == 0, 1))
