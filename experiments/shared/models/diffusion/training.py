"""Training from scratch: AdamW, a moving average of the parameters, labels dropped now and then."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared.models.diffusion.network import Network, Params
from experiments.shared.models.diffusion.schedule import Prediction, noised, stratified_times, target


class Pictures(NamedTuple):
    """Images [N, H, W, C], floating in [-1, 1], and their labels, int [N, attributes]."""

    x: Any
    labels: Any

    def taken(self, rows: Any) -> "Pictures":
        return Pictures(self.x[rows], self.labels[rows])


class Noised(NamedTuple):
    """Images at random times, what a network should predict of them, and their labels."""

    x: jax.Array
    t: jax.Array
    target: jax.Array
    labels: jax.Array


def noised_pictures(key: jax.Array, pictures: Pictures, kind: Prediction = "velocity") -> Noised:
    times, noises = jax.random.split(key)
    t = stratified_times(times, len(pictures.x))
    noise = jax.random.normal(noises, pictures.x.shape, pictures.x.dtype)
    labels = jnp.asarray(pictures.labels)
    return Noised(noised(pictures.x, noise, t), t, target(kind, pictures.x, noise, t), labels)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
      steps, batch_size, rate: of AdamW, whose rate rises for a tenth of the steps, 200 at most, then falls.
      dropped: the share of labels that are replaced by none.
      memory: of the moving average of the parameters, which is the model.
    """

    steps: int
    batch_size: int = 64
    rate: float = 2e-3
    dropped: float = 0.1
    memory: float = 0.995
    kind: Prediction = "velocity"


def denoising_loss(
    network: Network, params: Params, examples: Noised, asked: jax.Array | None = None
) -> jax.Array:
    """The mean squared error of each prediction, [B]; `asked` [B, width] in place of the labels."""
    asked = network.embed(params, examples.labels) if asked is None else asked
    predicted = network.predict(params, examples.x, examples.t, asked)
    return jnp.mean((predicted - examples.target) ** 2, tuple(range(1, predicted.ndim)))


def without_some(key: jax.Array, labels: jax.Array, dropped: float) -> jax.Array:
    """-1 in place of all labels of an example, in that share of them."""
    gone = jax.random.bernoulli(key, dropped, (len(labels), 1))
    return jnp.where(gone, -1, labels)


class State(NamedTuple):
    """The parameters and their moving average, each like the network's, and the optimiser's state."""

    params: Any
    average: Any
    optimizer: Any


class Trained(NamedTuple):
    """The averaged parameters, and the loss of every step."""

    params: Params
    losses: np.ndarray


Train = Callable[..., Trained]
"""(pictures, rows, seed, report) -> Trained, on those rows; report(part) of the whole in between."""

CHUNK = 50
"""Steps of one compiled call."""


def make_trainer(network: Network, recipe: Recipe) -> Train:
    """Compiled once for each number of pictures, whatever rows of them are trained on."""
    if recipe.steps % CHUNK:
        raise ValueError(f"steps must be a multiple of {CHUNK}, got {recipe.steps}")
    warm_up = min(200, recipe.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.rate, warm_up, recipe.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99))

    def start(key: jax.Array) -> State:
        params = network.init(key)
        return State(params, params, tx.init(params))

    def run(state: State, pictures: Pictures, rows: jax.Array, amount: jax.Array, keys: jax.Array):
        def step(state: State, key: jax.Array):
            rows_key, noise_key, drop_key = jax.random.split(key, 3)
            drawn = rows[jax.random.randint(rows_key, (recipe.batch_size,), 0, amount)]
            examples = noised_pictures(noise_key, pictures.taken(drawn), recipe.kind)
            examples = examples._replace(labels=without_some(drop_key, examples.labels, recipe.dropped))
            of = lambda params: denoising_loss(network, params, examples).mean()
            loss, grads = jax.value_and_grad(of)(state.params)
            updates, optimizer = tx.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            average = optax.incremental_update(params, state.average, 1 - recipe.memory)
            return State(params, average, optimizer), loss

        return jax.lax.scan(step, state, keys)

    start, run = jax.jit(start), jax.jit(run, donate_argnums=0)

    def train(
        pictures: Pictures,
        rows: np.ndarray,
        seed: int,
        report: Callable[[float], None] = lambda part: None,
    ) -> Trained:
        on_device = Pictures(*map(jnp.asarray, pictures))
        # Of one length for any number of rows.
        padded, amount = jnp.asarray(np.resize(rows, len(pictures.x))), jnp.int32(len(rows))
        first, then = jax.random.split(jax.random.key(seed))
        state, losses = start(first), []
        for keys in jax.random.split(then, (recipe.steps // CHUNK, CHUNK)):
            state, part = run(state, on_device, padded, amount, keys)
            losses.append(np.asarray(part))
            report(CHUNK / recipe.steps)
        return Trained(state.average, np.concatenate(losses))

    return train
