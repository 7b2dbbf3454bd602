"""EUPMU: the method of this package, on random labels."""

import optax

import eupmu_jax as eu
from experiments.peers.method import Apply, Method, random_label_losses, record


def eupmu(apply: Apply, optimizer: optax.GradientTransformation, *, demand, **settings) -> Method:
    """`eupmu_jax.eupmu` with tolerance -demand: the retain loss is asked to fall a little every step."""
    tx = eu.eupmu(random_label_losses(apply), optimizer, tolerance=-demand, **settings)

    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)  # pyright: ignore[reportArgumentType]
        info = eu.surgery_info(state)
        params = optax.apply_updates(params, updates)
        return params, state, record(info.forget_loss, info.retain_loss, info.multiplier)

    return Method(lambda params, batches: tx.init(params), step)
