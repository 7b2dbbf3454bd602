"""TorchJD's own aggregators, on the forget and retain gradients of a model in JAX.

They weight the gradients by their inner products alone. So these four numbers go to PyTorch in every step,
and two weights come back. It needs the extra "benchmarks".
"""

# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu
from experiments.shared.methods.method import LossFunctions, Method, descend, forget_and_retain, record

Weigh = Callable[..., tuple[np.ndarray, Any]]
"""(products [2, 2], knob [], memory) -> (weights [2] of the forget and the retain gradient, memory)."""


def upgrad(
    losses: LossFunctions, optimizer: optax.GradientTransformation, *, weight: jax.Array | float
) -> Method:
    """UPGrad: the mean of both gradients, each projected so that it conflicts with neither.

    The retain gradient counts `weight` times as much as the forget gradient.

    Source: arXiv 2406.16232.
    """

    def weigh(products, weight, memory):
        import torch
        from torchjd.aggregation import UPGradWeighting

        preference = torch.tensor([1.0, float(weight)]) / (1 + float(weight))
        return UPGradWeighting(preference)(torch.tensor(np.array(products))).numpy(), memory

    return aggregated(losses, optimizer, weigh, weight, ())


def pcd(losses: LossFunctions, optimizer: optax.GradientTransformation, *, tau: jax.Array | float) -> Method:
    """Priority-constrained descent: the forget gradient, as far as the retain loss falls at a share `tau`.

    The share is of the fall that a step along its own normalised gradient would give.

    Source: arXiv 2606.29521.
    """

    def weigh(products, tau, memory):
        import torch
        from torchjd.aggregation import PCDWeighting

        weighting = PCDWeighting(float(tau))
        steps, squares = int(memory[0]), torch.tensor(np.array(memory[1]))
        if steps:
            # It keeps its moving average to itself. A compiled loop has to carry it.
            weighting._n_steps, weighting._sq_norm_ema = torch.tensor(steps), squares.double()
            weighting._state_key = 2
        weights = weighting(torch.tensor(np.array(products))).numpy()
        squares = weighting._sq_norm_ema.numpy().astype(products.dtype)
        return weights, (np.int32(weighting._n_steps), squares)

    return aggregated(losses, optimizer, weigh, tau, (jnp.int32(0), jnp.zeros(2)))


def aggregated(
    losses: LossFunctions,
    optimizer: optax.GradientTransformation,
    weigh: Weigh,
    knob: jax.Array | float,
    memory: Any,
) -> Method:
    """Descends along both gradients under the weights that `weigh` gives them, on the host."""
    grads_fn = eu.forget_and_retain_grads(forget_and_retain(losses))

    def step(params, state, batch):
        inner, memory = state
        losses, forget, retain = grads_fn(params, batch)
        of = optax.tree.vdot
        products = jnp.stack([of(forget, forget), of(forget, retain), of(forget, retain), of(retain, retain)])
        shapes = jax.eval_shape(lambda: (jnp.zeros(2), memory))
        weights, memory = jax.pure_callback(
            weigh, shapes, products.reshape(2, 2), knob, memory, vmap_method="sequential"
        )
        direction = jax.tree.map(lambda f, r: weights[0] * f + weights[1] * r, forget, retain)
        params, inner = descend(optimizer, direction, inner, params)
        return params, (inner, memory), record(*losses, weights[1] / weights[0])

    return Method(lambda params, batches: (optimizer.init(params), memory), step)
