"""The judge of samples: a classifier of all attributes, whose hidden units are the features of distances."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared.models.convolution import convolution
from experiments.shared.models.diffusion.training import Pictures

# Seen on clean images alone it would be sure of what is none.
MOST_NOISE = 0.5
BATCH, ROWS_AT_ONCE = 128, 1000


class MLP(nn.Module):
    """Images in, logits of all attributes one after the other out, and the last hidden units."""

    outputs: int
    widths: tuple[int, ...] = (256, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x), x


class CNN(nn.Module):
    """The same, with two convolutions before the hidden units."""

    outputs: int
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        conv = partial(nn.Conv, kernel_size=(3, 3), conv_general_dilated=convolution)
        x = nn.relu(conv(self.width)(x))
        x = nn.relu(conv(2 * self.width, strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.outputs)(x), x


class Seen(NamedTuple):
    """What the judge says of images: the most probable labels [N, attributes], and features [N, 64]."""

    labels: np.ndarray
    features: np.ndarray


class Judge(NamedTuple):
    """A classifier of images with so many values of each attribute.

    Attributes:
      train: (pictures, steps, seed) -> params.
      look: (params, images) -> Seen.
      labels: (params, images) -> the labels alone, for use within a compiled function.
    """

    train: Callable[[Pictures, int, int], Any]
    look: Callable[[Any, np.ndarray], Seen]
    labels: Callable[[Any, jax.Array], jax.Array]


def make_judge(sizes: tuple[int, ...], shape: tuple[int, ...], network: type[MLP] | type[CNN] = MLP) -> Judge:
    """`shape` is that of one image."""
    module = network(sum(sizes))
    ends = np.cumsum(sizes)[:-1]

    def heads(params: Any, x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        logits, features = map(jnp.asarray, module.apply({"params": params}, x))
        return jnp.split(logits, ends, -1), features

    def step(carry, key, pictures, tx):
        params, state = carry
        rows_key, level_key, noise_key = jax.random.split(key, 3)
        drawn = pictures.taken(jax.random.randint(rows_key, (BATCH,), 0, len(pictures.x)))
        level = jax.random.uniform(level_key, (BATCH, 1, 1, 1), maxval=MOST_NOISE)
        x = drawn.x + level * jax.random.normal(noise_key, drawn.x.shape)

        def loss(params):
            each = optax.softmax_cross_entropy_with_integer_labels
            return sum(each(z, y).mean() for z, y in zip(heads(params, x)[0], drawn.labels.T, strict=True))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @partial(jax.jit, static_argnums=1)
    def run(pictures: Pictures, steps: int, key: jax.Array):
        first, then = jax.random.split(key)
        params = module.init(first, pictures.x[:1])["params"]
        tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
        of = partial(step, pictures=pictures, tx=tx)
        return jax.lax.scan(of, (params, tx.init(params)), jax.random.split(then, steps))[0][0]

    def labels(params: Any, x: jax.Array) -> jax.Array:
        return jnp.stack([z.argmax(-1) for z in heads(params, x)[0]], -1)

    @jax.jit
    def look_at(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return labels(params, x), heads(params, x)[1]

    def look(params: Any, images: np.ndarray) -> Seen:
        parts = []
        for start in range(0, len(images), ROWS_AT_ONCE):
            part = images[start : start + ROWS_AT_ONCE]
            padded = np.resize(part, (ROWS_AT_ONCE, *shape))
            parts.append([np.asarray(found)[: len(part)] for found in look_at(params, padded)])
        return Seen(*(np.concatenate(found) for found in zip(*parts, strict=True)))

    train = lambda pictures, steps, seed: run(
        Pictures(*map(jnp.asarray, pictures)), steps, jax.random.key(seed)
    )
    return Judge(train, look, labels)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Frechet's, of Gaussians with the means and covariances of features [N, D] (arXiv 1706.08500)."""
    (mean, cov), (mean_0, cov_0) = (
        (features.mean(0), np.cov(features.T)) for features in (np.float64(found), np.float64(expected))
    )
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_0 @ root), 0)).sum()
    return float(np.sum((mean - mean_0) ** 2) + np.trace(cov) + np.trace(cov_0) - 2 * crossed)
