"""The classifiers of the studies and their training: an MLP, and ResNet-18 for 32 x 32 images."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared.data.images import Examples


class MLP(nn.Module):
    """Two hidden layers; images in, logits out."""

    classes: int
    widths: tuple[int, ...] = (256, 128)

    @nn.compact
    def __call__(self, x, train: bool):
        x = x.reshape(len(x), -1) / 255
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        # Momentum 0: the statistics that come out are the batch's own.
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.0)
        conv = partial(nn.Conv, use_bias=False)
        y = nn.relu(norm()(conv(self.width, (3, 3), self.stride)(x)))
        y = norm()(conv(self.width, (3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv(self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """He et al., arXiv 1512.03385, with the 3 x 3 stem that is usual on small images."""

    classes: int
    width: int = 64

    @nn.compact
    def __call__(self, x, train: bool):
        x = x / 255
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.0)(x))
        for stage in range(4):
            for block in range(2):
                x = ResidualBlock(self.width * 2**stage, 2 if stage and not block else 1)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


MODELS = {"mlp": MLP, "resnet18": ResNet18}


class Classifier(NamedTuple):
    """A model as pure functions.

    init(key, x) -> params; apply(params, x) -> logits [n, classes], normalised by the batch's own
    statistics; predict(params, calibration, x) -> probabilities [n, classes], normalised by the mean
    statistics over the batches of `calibration` [k, batch, ...]. Estimating the statistics when they
    are needed, as for stochastic weight averaging, leaves nothing for an unlearning method to carry.
    """

    init: Callable[[jax.Array, Any], Any]
    apply: Callable[[Any, Any], jax.Array]
    predict: Callable[[Any, Any, Any], jax.Array]


def make_classifier(model: nn.Module) -> Classifier:
    def forward(params, x):
        logits, state = model.apply({"params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.asarray(logits), state

    def predict(params, calibration, x):
        statistics = jax.lax.map(lambda batch: forward(params, batch)[1], calibration)
        variables = {"params": params} | jax.tree.map(lambda leaf: leaf.mean(0), statistics)
        logits = lambda x: jnp.asarray(model.apply(variables, x[None], train=False))[0]
        return jax.nn.softmax(jax.lax.map(logits, x, batch_size=min(len(x), 1000)))

    init = lambda key, x: model.init(key, x, train=False)["params"]
    return Classifier(init, lambda params, x: forward(params, x)[0], predict)


def calibration(examples: Examples, rows: Any) -> Any:
    """Images of those rows, or of the first 5,000, in batches [k, 250, ...]; the last is filled up."""
    batches = min(20, -(-len(rows) // 250))
    return examples.x[jnp.resize(rows, (batches, 250))]


def augment(key: jax.Array, x: jax.Array) -> jax.Array:
    """Each image shifted by up to 4 pixels and mirrored or not, as is usual for CIFAR."""

    def one(key, image):
        shift, mirror = jax.random.split(key)
        padded = jnp.pad(image, ((4, 4), (4, 4), (0, 0)))
        corner = (*jax.random.randint(shift, (2,), 0, 9), 0)
        image = jax.lax.dynamic_slice(padded, corner, image.shape)
        return jnp.where(jax.random.bernoulli(mirror), image[:, ::-1], image)

    return jax.vmap(one)(jax.random.split(key, len(x)), x)


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


class Trainer(NamedTuple):
    """Training of one classifier by one recipe, compiled once for each size of training set.

    plan(rows, seed) -> row numbers [epochs, steps, batch] out of `rows`.
    train(examples, plan, seed, report) -> (params, seconds without compilation) from a random start.
    train_many(examples, plans [n, epochs, steps, batch], keys [n]) -> params [n, ...], in one compiled call.
    """

    plan: Callable[[np.ndarray, int], np.ndarray]
    train: Callable[..., tuple[Any, float]]
    train_many: Callable[[Examples, Any, jax.Array], Any]


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
            x, y = examples[batch_rows]
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
        return params, seconds

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
