"""Unlearning methods behind one interface, and the loop that runs any of them."""

import time
from collections.abc import Callable
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

    def step(params, state, batch):
        def objective(params):
            losses = losses_fn(params, batch)
            return (losses.forget + weight * losses.retain) / (1 + weight), losses

        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, record(losses, jnp.float32(weight))

    return Method(optimizer.init, step)


def exact_surgery(losses_fn, optimizer: optax.GradientTransformation) -> Method:
    """The closed-form projection of every step's two gradients."""
    tx = optax.chain(eu.explicit_surgery(), optimizer)

    def step(params, state, batch):
        losses, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(params, batch)
        updates, state = tx.update(forget_grads, state, params, retain_grads=retain_grads)
        _, multiplier = eu.unilateral_projection(forget_grads, retain_grads)
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


def record(losses: eu.Losses, multiplier: jax.Array) -> dict[str, jax.Array]:
    return {"forget_loss": losses.forget, "retain_loss": losses.retain, "multiplier": multiplier}


class Run(NamedTuple):
    """Unlearned parameters, each step's record as arrays [steps], and seconds without compilation."""

    params: Any
    history: dict[str, np.ndarray]
    seconds: float


def unlearn(
    method: Method,
    params: Any,
    split: Split,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    report: Callable[[float], None] = lambda part: None,
) -> Run:
    """Runs a method on paired forget and retain batches, ten compiled chunks of steps in all.

    `split.forget` carries the labels to learn in place of the true ones. `report` is called with the
    share of the work that a chunk has done.
    """
    data = jax.tree.map(jnp.asarray, (split.forget, split.retain))
    rows = tuple(
        batch_rows(examples.size, batch_size, steps, seed=(seed, offset)).reshape(10, -1, batch_size)
        for offset, examples in enumerate((split.forget, split.retain))
    )

    def run_chunk(params, state, data, rows):
        def body(carry, rows):
            batch = tuple(examples[index] for examples, index in zip(data, rows, strict=True))
            params, state = carry
            params, state, seen = method.step(params, state, batch)
            return (params, state), seen

        (params, state), seen = jax.lax.scan(body, (params, state), rows)
        return params, state, seen

    params, state = jax.tree.map(jnp.copy, params), method.init(params)
    first = tuple(r[0] for r in rows)
    compiled = jax.jit(run_chunk, donate_argnums=(0, 1)).lower(params, state, data, first).compile()
    history, seconds = [], 0.0
    for chunk in zip(*rows, strict=True):
        start = time.perf_counter()
        params, state, seen = compiled(params, state, data, chunk)
        history.append(jax.device_get(seen))
        seconds += time.perf_counter() - start
        report(1 / len(rows[0]))
    return Run(params, jax.tree.map(lambda *parts: np.concatenate(parts), *history), seconds)
