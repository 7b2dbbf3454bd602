"""The small network of the classification studies, its training, and its losses for unlearning."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.data import Examples, batch_rows


class MLP(nn.Module):
    """Two hidden layers; logits out."""

    classes: int
    widths: tuple[int, ...] = (256, 128)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


def apply(model: nn.Module, params: Any, x: Any) -> jax.Array:
    """Logits [n, classes]."""
    return jnp.asarray(model.apply({"params": params}, x))


def mean_cross_entropy(model: nn.Module, params: Any, examples: Examples) -> jax.Array:
    logits = apply(model, params, examples.x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples.y).mean()


def make_losses(model: nn.Module) -> Callable[[Any, tuple[Examples, Examples]], eu.Losses]:
    """Cross-entropy to the wrong labels on the forget batch, to the true ones on the retain batch."""

    def losses_fn(params, batch):
        forget, retain = batch
        return eu.Losses(mean_cross_entropy(model, params, forget), mean_cross_entropy(model, params, retain))

    return losses_fn


def train(
    model: nn.Module,
    examples: Examples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    report: Callable[[float], None] = lambda part: None,
) -> tuple[Any, float]:
    """Parameters after Adam on the cross-entropy from a random start, and seconds without compilation.

    `report` is called after each epoch, with the share of the work that it has done.
    """
    params = model.init(jax.random.key(seed), jnp.asarray(examples.x[:1]))["params"]
    tx = optax.adam(learning_rate)
    state = tx.init(params)
    data = Examples(*map(jnp.asarray, examples))
    rows = [
        batch_rows(examples.size, batch_size, examples.size // batch_size, seed=(seed, epoch))
        for epoch in range(epochs)
    ]

    def run_epoch(params, state, data, rows):
        def step(carry, rows):
            params, state = carry
            grads = jax.grad(partial(mean_cross_entropy, model))(params, data[rows])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), rows)[0]

    compiled = jax.jit(run_epoch, donate_argnums=(0, 1)).lower(params, state, data, rows[0]).compile()
    start = time.perf_counter()
    for epoch_rows in rows:
        params, state = compiled(params, state, data, epoch_rows)
        report(1 / epochs)
    jax.block_until_ready(params)
    return params, time.perf_counter() - start
