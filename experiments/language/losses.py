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
from experiments.shared.models.llama.model import token_log_probs
from experiments.shared.models.lora import Adapter

ADAPTER_SCALE = 2.0
NPO_BETA = 0.1
# Where a token's probability is 1 to float32, that of all others together is 0, which has no logarithm.
CERTAIN = -1e-6

Model = dict[str, Any]
"""What is unlearned: "base", the model's parameters, and "adapter", low-rank weights or nothing."""


class Forget(NamedTuple):
    """Rows to forget, and the log-probability that the model gave to each before."""

    rows: Rows
    reference: np.ndarray


def log_probs(config: Config, model: Model, tokens: jax.Array) -> jax.Array:
    """Of tokens[:, 1:], each after those before it, in nats [B, T - 1]."""
    adapters: Sequence[Adapter] = [Adapter(ADAPTER_SCALE, model["adapter"])] if model["adapter"] else ()
    return token_log_probs(config, model["base"], tokens[:, :-1], tokens[:, 1:], adapters)


def of_rows(log_p: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum over the tokens of each row that count, [B]; with log-probabilities that of the row."""
    return jnp.sum(jnp.where(mask[:, 1:], log_p, 0), -1)


def unlikelihood(log_p: jax.Array, mask: jax.Array) -> eu.Mean:
    """-log(1 - p), the mean over the tokens that count."""
    loss = -jnp.log(-jnp.expm1(jnp.minimum(log_p, CERTAIN)))
    return eu.Mean(of_rows(loss, mask).sum(), mask[:, 1:].sum().astype(loss.dtype))


def cross_entropies(log_p: jax.Array, masks: Mapping[str, jax.Array]) -> eu.Mean:
    """Nats per token of each set, [K] in sorted order; the rows of log_p follow each other in that order."""
    totals, counts, start = [], [], 0
    for name in sorted(masks):
        mask = masks[name]
        totals.append(-of_rows(log_p[start : start + len(mask)], mask).sum())
        counts.append(mask[:, 1:].sum().astype(log_p.dtype))
        start += len(mask)
    return eu.Mean(jnp.stack(totals), jnp.stack(counts))


def make_losses(config: Config, npo: bool = False) -> Callable[[Model, Any], eu.Losses]:
    """Forgetting by unlikelihood, or by NPO; one retain loss for each set of a dict."""

    def losses_fn(model: Model, batch: Any) -> eu.Losses:
        forget, retain = batch["forget"], batch["retain"]
        sets = [forget.rows.tokens, *(retain[name].tokens for name in sorted(retain))]
        log_p = log_probs(config, model, jnp.concatenate(sets))
        amount, mask = len(sets[0]), forget.rows.mask
        if npo:
            each = objectives.npo(of_rows(log_p[:amount], mask), forget.reference, NPO_BETA)
            forgotten = objectives.masked_mean(each)
        else:
            forgotten = unlikelihood(log_p[:amount], mask)
        kept = cross_entropies(log_p[amount:], {name: rows.mask for name, rows in retain.items()})
        return eu.Losses(forgotten, kept)

    return losses_fn


def known(config: Config, model: Model, rows: Rows) -> jax.Array:
    """Nats per token: what implanting and the attacks descend."""
    mask = jnp.asarray(rows.mask)
    return -of_rows(log_probs(config, model, jnp.asarray(rows.tokens)), mask).sum() / mask[:, 1:].sum()
