"""Training of a classifier by a recipe: one model at a time, or many in one compiled call."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared.data.images import Examples
from experiments.shared.labels import LabelledExamples
from experiments.shared.models.classifier import Classifier

Labelled = Examples | LabelledExamples


def augment(key: jax.Array, x: jax.Array) -> jax.Array:
    """Each image shifted by up to 4 pixels and mirrored or not, as is usual for CIFAR."""

    def one(key, image):
        shift, mirror = jax.random.split(key)
        padded = jnp.pad(image, ((4, 4), (4, 4), (0, 0)))
        corner = (*jax.random.randint(shift, (2,), 0, 9), 0)
        image = jax.lax.dynamic_slice(padded, corner, image.shape)
        return jnp.where(jax.random.bernoulli(mirror), image[:, ::-1], image)

    return jax.vmap(one)(jax.random.split(key, len(x)), x)


def augmented(key: jax.Array, examples: LabelledExamples) -> LabelledExamples:
    """The same examples with augmented images."""
    return examples._replace(x=augment(key, examples.x))


def batch_rows(rows: np.ndarray, batch_size: int, steps: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """Row numbers [steps, batch_size] out of `rows`: reshuffled passes, one after another."""
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch_size // len(rows))
    order = np.concatenate([rng.permutation(rows) for _ in range(passes)])
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a classifier is trained."""

    epochs: int
    """Passes over the training set."""

    batch_size: int
    """Images in a training step."""

    optimizer: Literal["adam", "sgd"]
    """SGD has momentum 0.9."""

    learning_rate: float
    """At the start."""

    weight_decay: float = 0.0
    """Of the training; decoupled in Adam."""

    drops: tuple[float, ...] = ()
    """Shares of the run after which the rate is divided by 10."""

    augmented: bool = False
    """Shift images by up to 4 pixels and mirror them at random; in unlearning, too."""


class Trained(NamedTuple):
    """A model's parameters, and the seconds that its training took without compilation."""

    params: Any
    seconds: float


class Trainer(NamedTuple):
    """Training of one classifier by one recipe, compiled once for each size of training set.

    Attributes:
      plan: (rows, seed) -> row numbers [epochs, steps, batch] out of `rows`.
      train: (examples, plan, seed, report) -> Trained, from a random start; report(part) of the training.
      train_many: (examples, plans [n, epochs, steps, batch], keys [n]) -> params [n, ...], in one
        compiled call.
    """

    plan: Callable[[np.ndarray, int], np.ndarray]
    train: Callable[..., Trained]
    train_many: Callable[[Labelled, np.ndarray, jax.Array], Any]


def make_trainer(classifier: Classifier, recipe: Recipe, side_by_side: int = 16) -> Trainer:
    """`side_by_side` is how many models train_many vmaps at a time."""

    def optimizer(steps: int) -> optax.GradientTransformation:
        drops = {int(share * steps): 0.1 for share in recipe.drops}
        rate = optax.piecewise_constant_schedule(recipe.learning_rate, drops)
        if recipe.optimizer == "adam":
            return optax.adamw(rate, weight_decay=recipe.weight_decay)
        return optax.chain(optax.add_decayed_weights(recipe.weight_decay), optax.sgd(rate, momentum=0.9))

    def plan(rows, seed):
        batch = min(recipe.batch_size, len(rows))
        steps = recipe.epochs * (len(rows) // batch)
        return batch_rows(rows, batch, steps, (seed, 4)).reshape(recipe.epochs, -1, batch)

    def start(key, examples, epochs, steps):
        init_key, data_key = jax.random.split(key)
        params = classifier.init(init_key, examples.x[:1])
        return params, optimizer(steps).init(params), jax.random.split(data_key, epochs)

    def run_epoch(params, state, key, examples, rows, steps):
        def step(carry, inputs):
            params, state = carry
            step_key, batch_rows = inputs
            x, y = examples.x[batch_rows], examples.y[batch_rows]
            x = augment(step_key, x) if recipe.augmented else x
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(classifier.apply(p, x), y).mean()
            updates, state = optimizer(steps).update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), (jax.random.split(key, len(rows)), rows))[0]

    compiled_epoch = jax.jit(run_epoch, static_argnums=5, donate_argnums=(0, 1))

    def train(examples, plan, seed, report=lambda part: None):
        steps = plan.shape[0] * plan.shape[1]
        params, state, keys = start(jax.random.key(seed), examples, len(plan), steps)
        seconds = 0.0
        for epoch_key, rows in zip(keys, plan, strict=True):
            run = compiled_epoch.lower(params, state, epoch_key, examples, rows, steps).compile()
            began = time.perf_counter()
            params, state = jax.block_until_ready(run(params, state, epoch_key, examples, rows))
            seconds += time.perf_counter() - began
            report(1 / len(plan))
        return Trained(params, seconds)

    @jax.jit
    def train_many(examples, plans, keys):
        def one(inputs):
            plan, key = inputs
            steps = plan.shape[0] * plan.shape[1]
            params, state, keys = start(key, examples, len(plan), steps)

            def epoch(carry, inputs):
                (params, state), (key, rows) = carry, inputs
                return run_epoch(params, state, key, examples, rows, steps), None

            return jax.lax.scan(epoch, (params, state), (keys, plan))[0][0]

        return jax.lax.map(one, (plans, keys), batch_size=min(side_by_side, len(plans)))

    return Trainer(plan, train, train_many)
