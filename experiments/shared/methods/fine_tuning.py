"""Fine-tuning on the retain set: forgetting by neglect."""

import jax
import optax

from experiments.shared.methods.method import Apply, Method, cross_entropy, descend, record


def fine_tuning(apply: Apply, optimizer: optax.GradientTransformation) -> Method:
    """Descends R; the forget set is not looked at."""

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(apply, p, *batch.retain))(params)
        params, state = descend(optimizer, grads, state, params)
        return params, state, record(retain_loss=loss)

    return Method(lambda params, batches: optimizer.init(params), step)
