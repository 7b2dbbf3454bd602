"""Flax NNX: a module that holds the model and the weights, for nnx.Optimizer as it is.

python -m experiments.hosts.nnx
"""

import optax
from flax import nnx

import eupmu_jax as eu
from eupmu_jax.flax import Weighted, lagrangian, saddle_point
from experiments.hosts import task


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def fit(loss_fn, tx, module, steps):
    """Training as Flax's examples write it."""

    @nnx.jit
    def step(module, optimizer, batch):
        optimizer.update(module, nnx.grad(loss_fn)(module, batch))

    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    for batch in task.batches(steps):
        step(module, optimizer, batch)


def main() -> task.Outcome:
    model = Network(nnx.Rngs(0))
    fit(task.knowing, optax.adam(3e-3), model, 400)

    before = task.retain_loss(model)
    budget = eu.Budget(task.TOTAL, baseline=before)
    fit(lagrangian(task.losses), saddle_point(optax.adam(1e-3), budget), Weighted(model, budget), 400)
    return task.report(model, before)


if __name__ == "__main__":
    main()
