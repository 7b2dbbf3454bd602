"""NGDiff: the difference of the two normalised gradients."""

import jax
import jax.numpy as jnp
import optax

import eupmu_jax as eu
from experiments.shared.methods.method import LossFunctions, Method, ascent_and_retain, descend, record


def ngdiff(losses: LossFunctions, optimizer: optax.GradientTransformation) -> Method:
    """Descends along grad R / |grad R| - grad L / |grad L|, L the training loss of the forget batch.

    Source: Bu et al., arXiv 2410.22086; the learning rate is tuned here, not set by their scheduler.
    """
    grads_fn = eu.forget_and_retain_grads(ascent_and_retain(losses))

    def normalised(grads):
        norm = optax.tree.norm(grads)
        return optax.tree.scale(jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0), grads), norm

    def step(params, state, batch):
        losses, forget_grads, retain_grads = grads_fn(params, batch)
        (forget, forget_norm), (retain, retain_norm) = normalised(forget_grads), normalised(retain_grads)
        params, state = descend(optimizer, jax.tree.map(jnp.add, forget, retain), state, params)
        return params, state, record(*losses, forget_norm / retain_norm)

    return Method(lambda params, batches: optimizer.init(params), step)
