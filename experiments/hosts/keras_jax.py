"""Keras 3 on JAX: a model whose train_step takes the Lagrangian's, for `fit` and all that comes with it.

pip install keras && python -m experiments.hosts.keras_jax
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras  # pyright: ignore[reportMissingImports]
import optax

import eupmu_jax as eu
from experiments.hosts import task


class Unlearning(keras.Model):
    """A network without state of its own (no BatchNorm, no Dropout), trained under a budget."""

    def __init__(self, network, budget, inner):
        super().__init__()
        self.network = network
        of = lambda params: lambda x: network.stateless_call(params, [], x)[0]
        self.loss_fn = eu.lagrangian(lambda params, batch: task.losses(of(params), batch))
        self.tx = eu.saddle_point(inner, budget)
        weighted = eu.weighted([variable.value for variable in network.trainable_variables], budget)
        leaves, self.structure = jax.tree.flatten((weighted.weights, self.tx.init(weighted)))
        # Keras carries arrays from step to step, and into its checkpoints, as variables.
        kept = lambda leaf: keras.Variable(leaf, trainable=False, dtype=leaf.dtype.name)
        self.kept = [kept(leaf) for leaf in leaves]
        self.built = True  # as the network is: there is nothing that Keras must find out from a batch

    def train_step(self, state, data):
        params, kept, *others = state
        weights, tx_state = jax.tree.unflatten(self.structure, kept)
        weighted = eu.Weighted(params, weights)
        loss, grads = jax.value_and_grad(self.loss_fn)(weighted, data[0])
        updates, tx_state = self.tx.update(grads, tx_state, weighted)
        *params, weights = jax.tree.leaves(optax.apply_updates(weighted, updates))
        return {"loss": loss}, (params, jax.tree.leaves((weights, tx_state)), *others)


def main() -> task.Outcome:
    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    network = keras.Sequential([keras.Input((64,)), *dense])
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = (jax.numpy.concatenate([part[name] for part in task.SETS.values()]) for name in "xy")
    network.fit(x, y, batch_size=64, epochs=15, verbose=0)

    before = task.retain_loss(network)
    budget = eu.Budget(task.TOTAL, baseline=before)
    model = Unlearning(network, budget, optax.adam(1e-3))
    model.compile()
    stream = ((batch,) for batch in task.batches(400))
    model.fit(stream, steps_per_epoch=400, shuffle=False, verbose=0)
    return task.report(network, before)


if __name__ == "__main__":
    main()
