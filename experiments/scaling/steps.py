"""The training steps that are compared: one model, one inner optimiser, the same texts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from eupmu_jax import objectives
from eupmu_jax.method.losses import LossesFn
from experiments.shared.models.llama.config import Config, projection_shapes
from experiments.shared.models.llama.model import Compute, hidden_states, initial_params, map_logits
from experiments.shared.models.lora import Adapter, initial_weights

PLAIN, BUDGET, EXACT = "fine-tuning", "EUPMU budget", "exact surgery"
LAGGED, LOOKAHEAD = "EUPMU lagged", "EUPMU look-ahead"

UTILITIES = 2
"""Sets to retain, each with a loss and a multiplier of its own."""

QUERIES, CHUNK = 512, 128
"""Tokens of a text whose attention scores, and whose logits, exist at a time."""

RANK, SCALE = 8, 2.0


class Parts(NamedTuple):
    """A model, {"base": parameters, "adapter": low-rank weights or {}}, split by what is trained."""

    trained: dict[str, Any]
    frozen: dict[str, Any]


class Batch(NamedTuple):
    """What a step sees beside what it trains.

    Attributes:
      frozen: the parameters that are not trained.
      tokens: [n, 1 + K, T + 1]: n texts to forget, and beside each one text of every set to retain.
    """

    frozen: dict[str, Any]
    tokens: jax.Array


class Method(NamedTuple):
    """A training step.

    Attributes:
      init: trained -> state.
      step: (trained, state, batch) -> (trained, state, losses).
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Batch], tuple[Any, Any, eu.Losses]]


def initial_parts(config: Config, lora: bool, key: jax.Array) -> Parts:
    """All parameters in bfloat16; or these frozen, and adapters of the queries and values in float32."""
    base = {"base": initial_params(config, key, jnp.bfloat16)}
    if not lora:
        return Parts({**base, "adapter": {}}, {})
    shapes = projection_shapes(config)
    return Parts({"adapter": initial_weights(shapes, config.num_hidden_layers, key, RANK)}, base)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with float32 state and arithmetic on parameters and gradients of any width."""

    def init(params):
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params: Any = None):
        wide = optax.tree.cast(updates, jnp.float32)
        wide, state = inner.update(wide, state, optax.tree.cast(params, jnp.float32))
        return optax.tree.cast_like(wide, updates), state

    return optax.GradientTransformation(init, update)


def optimizer() -> optax.GradientTransformation:
    """AdamW with float32 moments after clipping by the global norm, as language models are trained."""
    adamw = optax.adamw(1e-5, b2=0.95, weight_decay=0.1)
    return in_float32(optax.chain(optax.clip_by_global_norm(1.0), adamw))


def nats(
    objective: Callable[..., jax.Array], model: dict[str, Any], hidden: jax.Array, tokens: jax.Array
) -> jax.Array:
    """The objective of each of tokens[:, 1:], [B, T]."""
    return map_logits(objective, model["base"], hidden, tokens[:, 1:], chunk=CHUNK)


def hidden_of(config: Config, model: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """What stands before each of tokens[:, 1:], [B, T, hidden_size]."""
    adapters = [Adapter(SCALE, model["adapter"])] if model["adapter"] else []
    read = tokens[:, :-1]
    compute = Compute(remat=True, query_chunk=min(QUERIES, read.shape[1]))
    return hidden_states(config, model["base"], read, adapters, compute)


def losses(model: dict[str, Any], hidden: jax.Array, tokens: jax.Array) -> eu.Losses:
    """Unlikelihood of the texts to forget, and the cross-entropy of each set to retain, [K], per token."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    forget = nats(objectives.unlikelihood, model, hidden[:, 0], tokens[:, 0])
    retain = nats(objectives.cross_entropy, model, flat(hidden[:, 1:]), flat(tokens[:, 1:]))
    by_set = retain.reshape(*tokens[:, 1:, 1:].shape)
    return eu.Losses(jnp.mean(forget), jnp.mean(by_set, (0, 2)))


def in_one_pass(config: Config) -> LossesFn:
    """All losses from one pass of the model over all texts.

    Each weight is gathered once, and the backward pass has one gradient to sum over its layers: two passes
    have one each until both are done.
    """

    def losses_fn(trained, batch):
        model, tokens = trained | batch.frozen, batch.tokens
        # Side by side, so that texts stay on the chips where they are.
        hidden = hidden_of(config, model, tokens.reshape(-1, tokens.shape[-1]))
        return losses(model, hidden.reshape(*tokens.shape[:2], *hidden.shape[1:]), tokens)

    return losses_fn


def in_two_passes(config: Config) -> LossesFn:
    """A pass for each kind of text: a gradient of the forget loss costs no work on what is retained."""

    def losses_fn(trained, batch):
        model, tokens = trained | batch.frozen, batch.tokens
        passes = [tokens[:, :1], tokens[:, 1:]]
        hidden = [hidden_of(config, model, part.reshape(-1, part.shape[-1])) for part in passes]
        shaped = [h.reshape(*part.shape[:2], *h.shape[1:]) for h, part in zip(hidden, passes, strict=True)]
        return losses(model, jnp.concatenate(shaped, 1), tokens)

    return losses_fn


def fine_tuning(losses_fn: LossesFn) -> Method:
    """One weighted loss."""
    inner = optimizer()

    def step(trained, state, batch):
        def objective(trained):
            losses = losses_fn(trained, batch)
            return 0.5 * losses.forget + 0.5 * jnp.mean(losses.retain), losses

        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        updates, state = inner.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, losses

    return Method(inner.init, step)


def eupmu(losses_fn: LossesFn, constraint: eu.Tolerance | eu.Budget) -> Method:
    """Implicit surgery."""
    tx = eu.eupmu(losses_fn, optimizer(), constraint, initial_multiplier=jnp.ones(UTILITIES))

    def step(trained, state, batch):
        updates, state = tx.update(None, state, trained, batch=batch)
        info = eu.surgery_info(state)
        return optax.apply_updates(trained, updates), state, eu.Losses(info.forget_loss, info.retain_loss)

    return Method(tx.init, step)


def exact_surgery(losses_fn: LossesFn) -> Method:
    """A gradient for each loss, and their projection."""
    tx = optax.chain(eu.explicit_surgery(eu.Tolerance(0.0)), optimizer())
    grads_fn = eu.forget_and_retain_grads(losses_fn)

    def step(trained, state, batch):
        losses, forget_grads, retain_grads = grads_fn(trained, batch)
        updates, state = tx.update(forget_grads, state, trained, retain_grads=retain_grads)
        return optax.apply_updates(trained, updates), state, losses

    return Method(tx.init, step)


METHODS: dict[str, Callable[[Config], Method]] = {
    PLAIN: lambda config: fine_tuning(in_one_pass(config)),
    BUDGET: lambda config: eupmu(in_one_pass(config), eu.Budget(0.1, baseline=2.0)),
    LAGGED: lambda config: eupmu(in_one_pass(config), eu.Tolerance(0.0)),
    LOOKAHEAD: lambda config: eupmu(in_one_pass(config), eu.Tolerance(0.0, measure="lookahead")),
    EXACT: lambda config: exact_surgery(in_two_passes(config)),
}
