"""From noise to images: DDIM and ancestral steps, guided by what is asked for; batches at once."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from experiments.shared.models.diffusion.network import Network, Params, Predict
from experiments.shared.models.diffusion.schedule import (
    LATEST,
    Prediction,
    clean_of,
    noised,
    rates_like,
)
from experiments.shared.models.lora import Adapter


def guided(
    network: Network,
    params: Params,
    asked: jax.Array,
    guidance: float | jax.Array,
    adapters: Sequence[Adapter] = (),
) -> Predict:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): p_0 + guidance (p - p_0).

    p is the prediction for what is asked for, [B, width], and p_0 that for nothing. A guidance of 1, a Python
    number, is p itself and half the work.
    """
    predict = partial(network.predict, params, adapters=adapters)

    def of(x: jax.Array, t: jax.Array) -> jax.Array:
        if isinstance(guidance, float | int) and guidance == 1:
            return predict(x, t, asked)
        both = predict(
            jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([asked, jnp.zeros_like(asked)])
        )
        ours, nothing = jnp.split(both, 2)
        return nothing + guidance * (ours - nothing)

    return of


def sample(
    predict: Predict,
    key: jax.Array,
    x: jax.Array,
    *,
    start: float = LATEST,
    steps: int = 20,
    eta: float = 0.0,
    kind: Prediction = "velocity",
) -> jax.Array:
    """Clean images, in [-1, 1], from x at time `start` (Song et al., arXiv 2010.02502).

    Args:
      predict: the prediction at (x, t).
      key: of the noise that is added where eta > 0.
      x: [B, H, W, C].
      start: the time of x, which is noise, or a noised image; the steps are equal parts of it.
      steps: how many predictions.
      eta: 0 for DDIM, which is a function of x, 1 for ancestral sampling.
      kind: what is predicted.
    """
    times = jnp.linspace(start, 0.0, steps + 1)

    def step(x, inputs):
        now, then, key = inputs
        clean = clean_of(kind, predict(x, jnp.full(len(x), now)), x, now)
        (signal, noise), (signal_then, noise_then) = (rates_like(t, x) for t in (now, then))
        implied = (x - signal * clean) / noise
        fresh = eta * noise_then / noise * jnp.sqrt(1 - jnp.minimum(signal / signal_then, 1.0) ** 2)
        x = signal_then * clean + jnp.sqrt(jnp.maximum(noise_then**2 - fresh**2, 0.0)) * implied
        return x + fresh * jax.random.normal(key, x.shape), None

    x, _ = jax.lax.scan(step, x, (times[:-1], times[1:], jax.random.split(key, steps)))
    return jnp.clip(x, -1, 1)


def partly_noised(key: jax.Array, images: jax.Array, start: float) -> jax.Array:
    """Images at time `start`, from which `sample` draws others like them (Meng et al., arXiv 2108.01073)."""
    return noised(images, jax.random.normal(key, images.shape), jnp.asarray(start))
