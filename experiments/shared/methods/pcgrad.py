"""PCGrad: two-sided gradient surgery, each gradient cleared of its conflict with the other."""

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.shared.methods.method import LossFunctions, Method, descend, forget_and_retain, record
from experiments.shared.methods.projection import tree_without_conflict


def pcgrad(losses: LossFunctions, optimizer: optax.GradientTransformation) -> Method:
    """Descends along the sum of the two gradients, each projected off the other's original.

    Source: Yu et al., arXiv 2001.06782, algorithm 1.
    """
    grads_fn = eu.forget_and_retain_grads(forget_and_retain(losses))

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        forget = tree_without_conflict(forget_grads, retain_grads)
        retain = tree_without_conflict(retain_grads, forget_grads)
        params, state = descend(optimizer, jax.tree.map(jnp.add, forget, retain), state, params)
        return params, state, record(*losses)

    return Method(lambda params, batches: optimizer.init(params), step)
