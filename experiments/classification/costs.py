"""What one step of a method costs, and a whole run."""

from typing import Any

import jax
import jax.numpy as jnp

from eupmu_jax import evaluation
from experiments.shared.methods.method import Batch, forget_and_retain
from experiments.shared.testbed import Testbed


def step_cost(testbed: Testbed, method: str) -> dict[str, float]:
    """One step's cost, and how many gradients of both losses on one batch it and the run amount to."""
    size, train = testbed.config.batch_size, testbed.train

    def batch(*leading: int) -> Batch:
        shape = lambda part: jax.ShapeDtypeStruct((*leading, *part.shape[1:]), part.dtype)
        examples = jax.tree.map(shape, train)
        number: Any = jax.ShapeDtypeStruct(leading[:-1], jnp.float32)
        return Batch(examples, examples, number, number)

    peer = testbed.peers[method]
    names = ("learning_rate", *peer.knobs, *(["baseline"] if peer.is_told_baseline else []))
    knobs = dict.fromkeys(names, jax.ShapeDtypeStruct((), jnp.float32))
    params = jax.eval_shape(testbed.classifier.init, jax.random.key(0), train.x[:1])
    unlearner = testbed.unlearner(method)
    init = lambda knobs, params, batches: unlearner.method(knobs).init(params, batches)
    state = jax.eval_shape(init, knobs, params, batch(1, size))
    step = jax.jit(
        lambda knobs, params, state, batch: unlearner.method(knobs).step(params, state, batch),
        donate_argnums=(1, 2),
    )
    costs = evaluation.step_cost(step, knobs, params, state, batch(size))
    both = lambda params, batch: sum(forget_and_retain(testbed.losses)(params, batch))
    gradients = costs["flops"] / evaluation.step_cost(jax.grad(both), params, batch(size))["flops"]
    return costs | {"gradients": gradients, "total": gradients * testbed.steps}
