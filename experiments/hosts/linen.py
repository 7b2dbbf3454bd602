"""Flax Linen: Flax's own TrainState trains the weights beside the parameters.

python -m experiments.hosts.linen
"""

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState

import eupmu_jax as eu
from experiments.hosts import task


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def fit(loss_fn, tx, params, steps):
    """Training as Flax's examples write it."""

    @jax.jit
    def step(state, batch):
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, batch))

    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    for batch in task.batches(steps):
        state = step(state, batch)
    return state.params


def main() -> task.Outcome:
    model = Network()
    of = lambda params: lambda x: model.apply(params, x)
    params = model.init(jax.random.key(0), task.SETS["retain"]["x"][:1])
    params = fit(lambda params, batch: task.knowing(of(params), batch), optax.adam(3e-3), params, 400)

    before = task.retain_loss(of(params))
    budget = eu.Budget(task.TOTAL, baseline=before)
    loss_fn = eu.lagrangian(lambda params, batch: task.losses(of(params), batch))
    tx = eu.saddle_point(optax.adam(1e-3), budget)
    params, _ = fit(loss_fn, tx, eu.weighted(params, budget), 400)
    return task.report(of(params), before)


if __name__ == "__main__":
    main()
