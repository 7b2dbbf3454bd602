"""The losses of the study: forget and retain rows in one pass of the model, a budget for each retain set."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eupmu_jax as eu
from eupmu_jax import objectives
from experiments.language.texts import Rows
from experiments.shared.models.llama.config import Config
from experiments.shared.models.llama.model import hidden_states, map_logits
from experiments.shared.models.lora import Adapter

ADAPTER_SCALE = 2.0
NPO_BETA = 0.1
CHUNK = 256
"""Tokens of a row whose logits exist at a time."""

CONFIDENCE, UNLIKELIHOOD, NPO = "confidence target", "unlikelihood", "NPO"

Model = dict[str, Any]
"""What is unlearned: "base", the model's parameters, and "adapter", low-rank weights or nothing."""


class Forget(NamedTuple):
    """Rows to forget, and what is known of them before the run.

    Attributes:
      rows: the rows.
      reference: the log-probability that the model gave to each before, [N].
      target: the confidence that each token should have, [N, T - 1]; 0 where none is asked for.
    """

    rows: Rows
    reference: np.ndarray
    target: np.ndarray


def hidden_of(config: Config, model: Model, tokens: jax.Array) -> jax.Array:
    """What stands before each of tokens[:, 1:], [B, T - 1, hidden_size]."""
    adapters: Sequence[Adapter] = [Adapter(ADAPTER_SCALE, model["adapter"])] if model["adapter"] else ()
    return hidden_states(config, model["base"], tokens[:, :-1], adapters)


def of_tokens(
    objective: Callable[..., jax.Array], model: Model, hidden: jax.Array, rows: Rows, *arrays: jax.Array
) -> jax.Array:
    """The objective of each of tokens[:, 1:] that counts, [B, T - 1]."""
    tokens, mask = jnp.asarray(rows.tokens[:, 1:]), jnp.asarray(rows.mask[:, 1:])
    return map_logits(objective, model["base"], hidden, tokens, *arrays, mask=mask, chunk=CHUNK)


def of_rows(values: jax.Array, rows: Rows) -> jax.Array:
    """The sum over the tokens of each row that count, [B]; with cross-entropies -log p of the row."""
    return jnp.sum(values, -1, where=jnp.asarray(rows.mask[:, 1:]))


def of_all(values: jax.Array, rows: Rows) -> eu.Mean:
    """The mean over all tokens that count."""
    return objectives.masked_mean(values, jnp.asarray(rows.mask[:, 1:]))


def forget_loss(kind: str, model: Model, hidden: jax.Array, forget: Forget) -> eu.Mean:
    """What is minimised, of rows whose hidden states are known."""
    values = lambda objective, *arrays: of_tokens(objective, model, hidden, forget.rows, *arrays)
    if kind == NPO:
        log_p = -of_rows(values(objectives.cross_entropy), forget.rows)
        return objectives.masked_mean(objectives.npo(log_p, forget.reference, NPO_BETA))
    if kind == UNLIKELIHOOD:
        return of_all(values(objectives.unlikelihood), forget.rows)
    return of_all(values(objectives.confidence_target, jnp.asarray(forget.target)), forget.rows)


def retain_losses(model: Model, hidden: jax.Array, retain: Mapping[str, Rows]) -> eu.Mean:
    """Nats per token of each set, [K] in sorted order; the rows of hidden follow each other in that order."""
    sets = [retain[name] for name in sorted(retain)]
    together: Any = jax.tree.map(lambda *parts: jnp.concatenate(parts), *sets)
    nats = of_tokens(objectives.cross_entropy, model, hidden, together)
    ends = np.cumsum([len(rows.tokens) for rows in sets])[:-1]
    means = [of_all(part, rows) for part, rows in zip(jnp.split(nats, ends), sets, strict=True)]
    return jax.tree.map(lambda *of_sets: jnp.stack(of_sets), *means)


def tokens_of(retain: Mapping[str, Rows]) -> list[jax.Array]:
    return [jnp.asarray(retain[name].tokens) for name in sorted(retain)]


def make_losses(config: Config, kind: str) -> Callable[[Model, Any], eu.Losses]:
    """A forget loss of that kind, and one retain loss for each set of a dict."""

    def losses_fn(model: Model, batch: Any) -> eu.Losses:
        forget, retain = batch["forget"], batch["retain"]
        tokens = [jnp.asarray(forget.rows.tokens), *tokens_of(retain)]
        hidden = hidden_of(config, model, jnp.concatenate(tokens))
        amount = len(tokens[0])
        return eu.Losses(
            forget_loss(kind, model, hidden[:amount], forget), retain_losses(model, hidden[amount:], retain)
        )

    return losses_fn


def nats_of(config: Config, model: Model, rows: Rows) -> jax.Array:
    """Cross-entropy of each of tokens[:, 1:] that counts, [B, T - 1]."""
    hidden = hidden_of(config, model, jnp.asarray(rows.tokens))
    return of_tokens(objectives.cross_entropy, model, hidden, rows)


def known(config: Config, model: Model, rows: Rows) -> jax.Array:
    """Nats per token: what implanting and the attacks descend."""
    mean = of_all(nats_of(config, model, rows), rows)
    return mean.total / mean.count


def before_unlearning(config: Config, model: Model, rows: Rows, unseen: Rows | None) -> Forget:
    """The rows to forget with what the model says of them, and what it says of unseen rows like them.

    A token's target is the confidence of unseen tokens at the same place: in the same field of their rows,
    as far from its start.
    """

    def values(model, part):
        hidden = hidden_of(config, model, jnp.asarray(part.tokens))
        nats = of_tokens(objectives.cross_entropy, model, hidden, part)
        return of_rows(-nats, part), of_tokens(objectives.confidence, model, hidden, part)

    of = lambda part: objectives.reference_values(values, model, part, batch_size=16)
    log_p, seen = of(rows)
    target = np.zeros_like(seen)
    if unseen is not None:
        counts, counts_unseen = rows.mask[:, 1:], unseen.mask[:, 1:]
        target[counts] = objectives.unseen_confidence(
            seen[counts], places(counts), of(unseen)[1][counts_unseen], places(counts_unseen), bins=None
        )
    return Forget(rows, log_p, target)


LATEST = 3
"""Tokens this far from the start of a field, and farther, are taken for alike."""


def places(mask: np.ndarray) -> np.ndarray:
    """(field, index of the token in it) of what counts, [n, 2]: a field is a stretch that counts."""
    before = np.pad(mask, [(0, 0), (1, 0)])[:, :-1]
    field = np.cumsum(mask & ~before, -1)
    index = np.zeros(mask.shape, int)
    for t in range(1, mask.shape[1]):
        index[:, t] = np.where(mask[:, t] & before[:, t], index[:, t - 1] + 1, 0)
    return np.stack([field, np.minimum(index, LATEST)], -1)[mask]
