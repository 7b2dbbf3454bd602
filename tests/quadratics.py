"""Losses whose constrained minimum is known, and a run that records what a budget does to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu

C = np.array([1.0, -2.0, 0.5])
C32 = C.astype(np.float32)


def quadratics(curvature, forget_scale=1.0, retain_scale=1.0, offset=0.7):
    """U = |x - c|^2, R = h |x|^2 + offset, or h @ x^2 + offset with h [K, 3]."""
    retain = lambda x: jnp.sum(curvature * x * x, -1)
    losses_fn = lambda x, batch: eu.Losses(
        forget_scale * jnp.sum((x - jnp.asarray(C, x.dtype)) ** 2), retain_scale * (retain(x) + offset)
    )
    return losses_fn, retain


def drive(tx, retain, x, batches=None, steps=None):
    """(x, state) after a scan over the batches, and R, the multiplier and `infeasible` of each step."""

    def step(carry, batch):
        x, state = carry
        updates, state = tx.update(None, state, x, batch=() if batch is None else batch)
        x = optax.apply_updates(x, updates)
        info = eu.surgery_info(state)
        return (x, state), (retain(x), info.multiplier, info.infeasible)

    return jax.lax.scan(step, (x, tx.init(x)), batches, length=steps)
