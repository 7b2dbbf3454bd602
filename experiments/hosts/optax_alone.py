"""Optax alone: one step serves for training and for unlearning.

python -m experiments.hosts.optax_alone
"""

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.hosts import task


def initial():
    hidden, out = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(hidden, (64, 64)) / 8,
        "bias": jnp.zeros(64),
        "out": jax.random.normal(out, (64, 10)) / 8,
    }


def predict(params, x):
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["out"]


def fit(loss_fn, tx, params, steps):
    """Training as anybody writes it."""

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in task.batches(steps):
        params, state = step(params, state, batch)
    return params


def of(params):
    return lambda x: predict(params, x)


def main() -> task.Outcome:
    knowing = lambda params, batch: task.knowing(of(params), batch)
    params = fit(knowing, optax.adam(3e-3), initial(), 400)

    before = task.retain_loss(of(params))
    budget = eu.Budget(task.TOTAL, baseline=before)
    loss_fn = eu.lagrangian(lambda params, batch: task.losses(of(params), batch))
    tx = eu.saddle_point(optax.adam(1e-3), budget)
    params, _ = fit(loss_fn, tx, eu.weighted(params, budget), 400)
    return task.report(of(params), before)


if __name__ == "__main__":
    main()
