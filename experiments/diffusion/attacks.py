"""Attempts to bring the concept back: relearning from a few pictures, and a search for what to ask for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from eupmu_jax.evaluation import relearning_curve
from experiments.shared.models.diffusion.network import Network, Params
from experiments.shared.models.diffusion.training import Pictures, denoising_loss, noised_pictures

RELEARNED_FROM = 10
GUIDANCES = (1.0, 2.0, 4.0, 8.0)
STARTS = (0.3, 0.5, 0.7, 0.9)
LOOKS = 4
"""How often an attack is looked at, after its start."""


class Step(NamedTuple):
    """The pictures of one step of an attack, and the key of their noise."""

    pictures: Pictures
    key: jax.Array


class Attacks(NamedTuple):
    """Both attacks, compiled once for all models.

    Attributes:
      relearn: (params, steps) -> params [LOOKS + 1, ...], at the start and along the fine-tuning.
      search: (params, asked [width], steps) -> asked [LOOKS + 1, width], that denoises the pictures best.
    """

    relearn: Callable[[Params, Step], Params]
    search: Callable[[Params, jax.Array, Step], jax.Array]


def make_attacks(network: Network, relearning_rate: float, search_rate: float) -> Attacks:
    def loss(params: Params, step: Step, asked: jax.Array | None = None) -> jax.Array:
        examples = noised_pictures(step.key, step.pictures)
        return denoising_loss(network, params, examples, asked).mean()

    def curve(loss: Callable[..., jax.Array], start: Any, steps: Step, rate: float) -> Any:
        every = len(steps.key) // LOOKS
        return relearning_curve(loss, lambda found: found, start, steps, optax.adam(rate), every)

    @jax.jit
    def relearn(params: Params, steps: Step) -> Params:
        return curve(loss, params, steps, relearning_rate)

    @jax.jit
    def search(params: Params, asked: jax.Array, steps: Step) -> jax.Array:
        of = lambda asked, step: loss(params, step, np.ones((len(step.pictures.x), 1)) * asked)
        return curve(of, asked, steps, search_rate)

    return Attacks(relearn, search)


def steps_of(pictures: Pictures, steps: int, batch_size: int, seed: int) -> Step:
    """Batches drawn from the pictures, all of them in every step where they are that few."""
    rng = np.random.default_rng(seed)
    size = min(batch_size, len(pictures.x))
    rows = np.stack([rng.permutation(len(pictures.x))[:size] for _ in range(steps)])
    return Step(pictures.taken(rows), jax.random.split(jax.random.key(seed), steps))
