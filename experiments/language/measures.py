"""What a model still knows of rows: nats, the tokens that greedy decoding would give, verbatim records."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.evaluation import exact_memorisation, extraction_strength, verbatim_prefix
from experiments.language.texts import Rows
from experiments.shared.models.llama.config import Config
from experiments.shared.models.llama.model import Params, hidden_states, map_logits

ROWS_AT_ONCE = 16


class Seen(NamedTuple):
    """Of tokens[:, 1:]: nats of each, and whether it is the most probable one, [N, T - 1]."""

    nats: np.ndarray
    hits: np.ndarray


@partial(jax.jit, static_argnums=0)
def seen_of(config: Config, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`Seen` of tokens [B, T]."""

    def each(z, targets):
        of_target = jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
        return jax.nn.logsumexp(z, -1) - of_target, jnp.argmax(z, -1) == targets

    hidden = hidden_states(config, params, tokens[:, :-1])
    return map_logits(each, params, hidden, tokens[:, 1:], chunk=256)


def look(config: Config, params: Params, tokens: np.ndarray) -> Seen:
    """`Seen` of any number of rows, some at a time; of equal ones only once."""
    tokens, which = np.unique(tokens, axis=0, return_inverse=True)
    missing = -len(tokens) % ROWS_AT_ONCE
    padded = np.concatenate([tokens, np.zeros((missing, tokens.shape[1]), tokens.dtype)])
    parts = [
        seen_of(config, params, padded[start : start + ROWS_AT_ONCE])
        for start in range(0, len(padded), ROWS_AT_ONCE)
    ]
    return Seen(
        *(np.concatenate(part)[which.reshape(-1)] for part in zip(*jax.device_get(parts), strict=True))
    )


def scores(seen: Seen, mask: np.ndarray) -> dict[str, float]:
    """Means over the rows of a set; `mask` [N, T] is that of its tokens.

    Returns:
      nats per token; `memorised`, the share of tokens that are the most probable ones (exact memorisation);
      `prefix`, the share of an answer before greedy decoding's first error; `strength`, that of its longest
      end without one; `verbatim`, the number of answers that greedy decoding gives whole.
    """
    mask = mask[:, 1:]
    prefix = verbatim_prefix(seen.hits, mask)
    return {
        "nats": float(np.sum(seen.nats, where=mask) / mask.sum()),
        "memorised": float(np.mean(exact_memorisation(seen.hits, mask))),
        "prefix": float(np.mean(prefix)),
        "strength": float(np.mean(extraction_strength(seen.hits, mask))),
        "verbatim": int(np.sum(prefix == 1)),
    }


def seen_of_sets(config: Config, params: Params, sets: dict[str, Rows]) -> dict[str, Seen]:
    """`Seen` of every set, whose rows are of one length."""
    ends = np.cumsum([len(rows.tokens) for rows in sets.values()])[:-1]
    seen = look(config, params, np.concatenate([rows.tokens for rows in sets.values()]))
    parts = zip(*(np.split(values, ends) for values in seen), strict=True)
    return {name: Seen(*part) for name, part in zip(sets, parts, strict=True)}


def measured(config: Config, params: Params, sets: dict[str, Rows]) -> dict[str, dict[str, float]]:
    """The scores of every set, whose rows are of one length."""
    seen = seen_of_sets(config, params, sets)
    return {name: scores(seen[name], rows.mask) for name, rows in sets.items()}


def nats_of_answers(seen: Seen, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each answer, and how many tokens it has, [N]."""
    return np.sum(seen.nats, -1, where=mask[:, 1:]), mask[:, 1:].sum(-1)
