"""l1-sparse: fine-tuning on the retain set under a decaying l1 penalty."""

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import LossFunctions, Method, descend, record, retain_loss


def l1_sparse(
    losses: LossFunctions, optimizer: optax.GradientTransformation, *, penalty: jax.Array | float
) -> Method:
    """Descends R + penalty (1 - progress) |theta|_1.

    Source: Jia et al., arXiv 2304.04934, with the linear decay of their code.
    """

    def step(params, state, batch):
        def objective(params):
            size = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(params))
            loss = retain_loss(losses, params, batch)
            return loss + penalty * (1 - batch.progress) * size, loss

        (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(params)
        params, state = descend(optimizer, grads, state, params)
        return params, state, record(retain_loss=loss)

    return Method(lambda params, batches: optimizer.init(params), step)
