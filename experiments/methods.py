"""Unlearning methods behind one interface: a transformation, and the step that feeds it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu
from experiments.data import Split, batch_rows


class Method(NamedTuple):
    """init(params) -> state; step(params, state, batch) -> (params, state, record of scalars)."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any, dict[str, jax.Array]]]


def scalarisation(losses_fn, optimizer: optax.GradientTransformation, weight: float) -> Method:
    """Linear scalarisation (U + weight R) / (1 + weight): one constant weight, one backward pass."""

    def objective(params, batch, weight):
        losses = losses_fn(params, batch)
        return (losses.forget + weight * losses.retain) / (1 + weight), losses

    def step(params, state, batch):
        state, weight = state
        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params, batch, weight)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), (state, weight), record(losses, weight)

    # The weight travels in the state, so all weights share one compiled step.
    return Method(lambda params: (optimizer.init(params), jnp.asarray(weight, jnp.float32)), step)


def exact_surgery(losses_fn, optimizer: optax.GradientTransformation, tolerance: float = 0.0) -> Method:
    """The closed-form projection of every step's gradients."""
    tx = optax.chain(eu.explicit_surgery(tolerance=tolerance), optimizer)

    def step(params, state, batch):
        losses, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(params, batch)
        updates, state = tx.update(forget_grads, state, params, retain_grads=retain_grads)
        _, multiplier = eu.unilateral_projection(forget_grads, retain_grads, tolerance)
        return optax.apply_updates(params, updates), state, record(losses, multiplier)

    return Method(tx.init, step)


def eupmu(losses_fn, optimizer: optax.GradientTransformation, **settings) -> Method:
    """The method of this package."""
    tx = eu.eupmu(losses_fn, optimizer, **settings)

    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)  # pyright: ignore[reportArgumentType]
        info = eu.surgery_info(state)
        losses = eu.Losses(info.forget_loss, info.retain_loss)
        return optax.apply_updates(params, updates), state, record(losses, info.multiplier)

    return Method(tx.init, step)


def record(losses: eu.Losses, multiplier) -> dict[str, jax.Array]:
    return {"forget_loss": losses.forget, "retain_loss": losses.retain, "multiplier": multiplier}


def unlearn(
    method: Method,
    params: Any,
    split: Split,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    report: Callable[[int], None] = lambda steps: None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Runs a method on paired forget and retain batches; returns params and each step's record.

    `split.forget` carries the labels to learn in place of the true ones. Calls report with the
    number of steps done after each compiled chunk.
    """
    data = jax.tree.map(jnp.asarray, (split.forget, split.retain))
    rows = tuple(
        batch_rows(examples.size, batch_size, steps, seed + offset)
        for offset, examples in enumerate((split.forget, split.retain))
    )
    params, state = jax.tree.map(jnp.copy, params), method.init(params)
    records = []
    chunk = max(1, steps // 10)
    run = compiled(method.step)
    for start in range(0, steps, chunk):
        here = tuple(r[start : start + chunk] for r in rows)
        params, state, seen = run(params, state, data, here)
        records.append(jax.device_get(seen))
        report(min(chunk, steps - start))
    return params, jax.tree.map(lambda *parts: np.concatenate(parts), *records)


def compiled(step):
    """Many steps in one call: a scan over the rows of each step's batches."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def run(params, state, data, rows):
        def body(carry, rows):
            batch = tuple(examples[index] for examples, index in zip(data, rows, strict=True))
            params, state, seen = step(*carry, batch)
            return (params, state), seen

        (params, state), seen = jax.lax.scan(body, (params, state), rows)
        return params, state, seen

    return run
