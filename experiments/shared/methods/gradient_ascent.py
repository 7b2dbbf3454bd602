"""Gradient ascent on the forget set's cross-entropy."""

import jax
import optax

from experiments.shared.methods.method import Apply, Method, cross_entropy, descend, record


def gradient_ascent(apply: Apply, optimizer: optax.GradientTransformation) -> Method:
    """Descends U = -CE(forget); the retain set is not looked at."""

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(lambda p: -cross_entropy(apply, p, *batch.forget))(params)
        params, state = descend(optimizer, grads, state, params)
        return params, state, record(forget_loss=loss)

    return Method(lambda params, batches: optimizer.init(params), step)
