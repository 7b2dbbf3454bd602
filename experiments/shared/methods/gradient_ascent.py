"""Gradient ascent on the forget set's training loss."""

import jax
import optax

from experiments.shared.methods.method import LossFunctions, Method, ascent_loss, descend, record


def gradient_ascent(losses: LossFunctions, optimizer: optax.GradientTransformation) -> Method:
    """Descends minus the training loss of the forget batch; the retain set is not looked at."""

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(lambda p: ascent_loss(losses, p, batch))(params)
        params, state = descend(optimizer, grads, state, params)
        return params, state, record(forget_loss=loss)

    return Method(lambda params, batches: optimizer.init(params), step)
