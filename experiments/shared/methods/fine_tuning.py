"""Fine-tuning on the retain set: forgetting by neglect."""

import jax
import optax

from experiments.shared.methods.method import LossFunctions, Method, descend, record, retain_loss


def fine_tuning(losses: LossFunctions, optimizer: optax.GradientTransformation) -> Method:
    """Descends R; the forget set is not looked at."""

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(lambda p: retain_loss(losses, p, batch))(params)
        params, state = descend(optimizer, grads, state, params)
        return params, state, record(retain_loss=loss)

    return Method(lambda params, batches: optimizer.init(params), step)
