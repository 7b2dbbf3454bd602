"""What is to be forgotten, and which part of the test set stays in question."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans

from experiments.shared.data.images import Data, Examples
from experiments.shared.models.classifier import Classifier, calibration
from experiments.shared.training import Trainer

HALVES = 16


class Task(NamedTuple):
    """What to forget of a training set.

    A forgotten class is left out of the validation and test sets: nobody is to be good at it.

    Attributes:
      name: what it was asked for as, "class:3".
      kind: "class", "subclass", "random" or "memorised".
      forget, retain: row numbers of the training set.
      whole_class: the label that is forgotten altogether, or None.
    """

    name: str
    kind: str
    forget: np.ndarray
    retain: np.ndarray
    whole_class: int | None = None

    @classmethod
    def of(cls, spec: str, forget: np.ndarray, size: int) -> "Task":
        """The task that forgets those of `size` training examples."""
        retain = np.setdiff1d(np.arange(size), forget)
        return cls(spec, kind_of(spec), forget, retain, whole_class_of(spec))

    def judged_on(self, examples: Examples) -> np.ndarray:
        """Row numbers of a held-out set by which utility is measured."""
        return np.flatnonzero(examples.y != (-1 if self.whole_class is None else self.whole_class))


def kind_of(spec: str) -> str:
    """What kind of task "KIND:VALUE" asks for."""
    return spec.partition(":")[0]


def whole_class_of(spec: str) -> int | None:
    """The label that the task forgets altogether, or None."""
    kind, _, value = spec.partition(":")
    return int(value) if kind == "class" else None


def make_task(spec: str, data: Data, trainer: Trainer, classifier: Classifier, seed: int) -> Task:
    """A task from "class:LABEL", "subclass:LABEL", "random:SHARE" or "memorised:SHARE"; else ValueError."""
    kind, _, value = spec.partition(":")
    train = data.train
    try:
        if kind in ("class", "subclass"):
            of_class = np.flatnonzero(train.y == int(value))
            forget = of_class if kind == "class" else of_class[largest_cluster(train.x[of_class], seed)]
        elif kind in ("random", "memorised"):
            count = round(float(value) * train.size)
            order = np.random.default_rng((seed, 1)).permutation(train.size)
            if kind == "memorised":
                order = np.argsort(-memorisation(train, trainer, classifier, seed), kind="stable")
            forget = order[:count]
        else:
            raise ValueError(f"unknown kind {kind!r}")
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"task {spec!r}: {error}; give class:LABEL, subclass:LABEL, random:SHARE or memorised:SHARE"
        ) from error
    if not 0 < len(forget) < train.size:
        raise ValueError(f"task {spec!r} forgets {len(forget)} of {train.size} training examples")
    return Task.of(spec, np.sort(forget), train.size)


def largest_cluster(x: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers of the largest of three clusters of images: a sub-class, entangled with the rest."""
    clusters = KMeans(3, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    labels = clusters.fit_predict(x.reshape(len(x), -1).astype(np.float64))
    return np.flatnonzero(labels == np.bincount(labels).argmax())


def memorisation(train: Examples, trainer: Trainer, classifier: Classifier, seed: int) -> np.ndarray:
    """How much more probable each label is to models that were trained on it than to others, [n].

    Sixteen models are trained on random halves, so that each example is in eight of them.

    Source: Feldman and Zhang, arXiv 2008.03703, equation 1, with probability in place of accuracy.
    """
    train = Examples(*map(jnp.asarray, train))
    rng = np.random.default_rng((seed, 3))
    orders = [rng.permutation(train.size) for _ in range(HALVES // 2)]
    halves = [half for order in orders for half in (order[: train.size // 2], order[train.size // 2 :])]
    halves = [half[: train.size // 2] for half in halves]
    plans = np.stack([trainer.plan(half, seed + i) for i, half in enumerate(halves)])
    params = trainer.train_many(train, plans, jax.random.split(jax.random.key(seed), HALVES))

    @jax.jit
    def confidence(of_model):
        params, half = of_model
        probabilities = classifier.predict(params, calibration(train.x, half), train.x)
        return jnp.take_along_axis(probabilities, train.y[:, None], 1)[:, 0]

    seen = np.asarray(jax.lax.map(confidence, (params, np.stack(halves))))
    inside = np.zeros((HALVES, train.size), bool)
    for i, half in enumerate(halves):
        inside[i, half] = True
    mean = lambda mask: np.where(mask, seen, 0).sum(0) / np.maximum(mask.sum(0), 1)
    return mean(inside) - mean(~inside)


def wrong_labels(labels: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """For each label another one, uniformly: what a forget example is to be taken for."""
    shift = np.random.default_rng((seed, 2)).integers(1, classes, size=len(labels))
    return ((labels + shift) % classes).astype(np.int32)
