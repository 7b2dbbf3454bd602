"""What is drawn and what is to be forgotten: a data set, its concepts, the network, and how much is done."""

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from experiments.shared.data import images
from experiments.shared.models.diffusion import dit
from experiments.shared.models.diffusion.training import Pictures, Recipe


class Concept(NamedTuple):
    """A value of an attribute that is to be forgotten, and the one that is to be drawn in its place."""

    attribute: int
    value: int
    instead: int

    def asked_for(self, labels: np.ndarray) -> np.ndarray:
        """Which of labels [N, attributes] have it, bool [N]."""
        return labels[:, self.attribute] == self.value

    def redirected(self, labels: Any) -> Any:
        """The same labels with the other value in place of every one of that attribute."""
        columns = np.arange(labels.shape[1])
        return labels + (columns == self.attribute) * (self.instead - labels)


class Scale(NamedTuple):
    """How much is done, and how fast.

    Attributes:
      recipe: of the model before, and of the one that never saw the concept.
      judge_steps: of the classifier of samples.
      steps, rate, batch_size: of every method, Adam's.
      adapter_steps, adapter_rate: likewise of each low-rank adapter.
      samples: how many are drawn for the concept; of the kept labels three times as many.
      relearning_steps, search_steps: of fine-tuning on a few pictures, and of the search for a vector; both
        are looked at four times.
      relearning_rate, search_rate: Adam's of these.
      methods: those that run, by name; None for all.
    """

    recipe: Recipe
    judge_steps: int
    steps: int
    rate: float
    batch_size: int
    adapter_steps: int
    adapter_rate: float
    samples: int
    relearning_steps: int
    relearning_rate: float
    search_steps: int
    search_rate: float
    methods: tuple[str, ...] | None = None


class Task(NamedTuple):
    """Pictures with attributes, and what is to be forgotten of them.

    Attributes:
      title: of the report.
      names: of the values of each attribute.
      train, held_out: pictures that the models are trained on, and others.
      concepts: the first is what all methods forget; each has an adapter of its own.
      make: the network, from its random numbers.
      scale: how much is done.
    """

    title: str
    names: tuple[tuple[str, ...], ...]
    train: Pictures
    held_out: Pictures
    concepts: tuple[Concept, ...]
    make: Callable[[nnx.Rngs], Any]
    scale: Scale

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.names))

    def name(self, concept: Concept) -> str:
        return self.names[concept.attribute][concept.value]


GUIDANCE = 1.5
"""Of all samples, unless an attack says otherwise."""


def pictures_of(examples: images.Examples) -> Pictures:
    """Images of bytes as floats in [-1, 1], and a column of labels."""
    return Pictures((examples.x / 127.5 - 1).astype(np.float32), examples.y[:, None].astype(np.int32))


def smaller(task: Task) -> Task:
    """The same as a smoke test: a tiny network, few steps and two methods."""
    size, channels = task.train.x.shape[1], task.train.x.shape[-1]
    shape = dit.Config(
        size=size, channels=channels, patch=size // 2, width=16, layers=2, heads=2, labels=task.sizes
    )
    scale = task.scale._replace(
        recipe=Recipe(100, memory=0.9), judge_steps=100, steps=10, batch_size=32, adapter_steps=5,
        samples=30, relearning_steps=4, search_steps=4, methods=("EUPMU budget", "SalUn"),
    )  # fmt: skip
    train, held_out = task.train.taken(slice(640)), task.held_out.taken(slice(200))
    return task._replace(train=train, held_out=held_out, make=partial(dit.DiT, shape), scale=scale)


def digits(data_dir: pathlib.Path | None) -> Task:
    """scikit-learn's digits, 8x8: the eights become threes, and in an adapter of its own the ones sevens."""
    train, held_out = map(pictures_of, images.load("digits", data_dir))
    scale = Scale(
        Recipe(1500), judge_steps=2000, steps=200, rate=5e-4, batch_size=64, adapter_steps=120,
        adapter_rate=1e-2, samples=300, relearning_steps=20, relearning_rate=5e-4,
        search_steps=200, search_rate=3e-2,
    )  # fmt: skip
    shape = dit.Config(size=8, channels=1, patch=2, width=64, layers=3, heads=4, labels=(10,))
    concepts = Concept(0, 8, 3), Concept(0, 1, 7)
    return Task("Digits", (tuple("0123456789"),), train, held_out, concepts, partial(dit.DiT, shape), scale)


CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def fashion_mnist(data_dir: pathlib.Path | None) -> Task:
    """5,000 of Fashion-MNIST's pictures, 28x28: trousers become bags, and in an adapter shirts T-shirts."""
    pools = images.load("fashion-mnist", data_dir)
    data = images.partition(*pools, train_size=5000, validation_size=1, test_size=1000, seed=0)
    scale = Scale(
        Recipe(1500, rate=1e-3), judge_steps=4000, steps=150, rate=5e-4, batch_size=64, adapter_steps=120,
        adapter_rate=1e-2, samples=100, relearning_steps=20, relearning_rate=5e-4,
        search_steps=100, search_rate=3e-2,
        methods=("EUPMU budget", "EUPMU look-ahead", "constant weight", "redirect alone", "SalUn"),
    )  # fmt: skip
    shape = dit.Config(size=28, channels=1, patch=4, width=128, layers=4, heads=4, labels=(10,))
    train, held_out = pictures_of(data.train), pictures_of(data.test)
    concepts = Concept(0, 1, 8), Concept(0, 6, 0)
    return Task("Fashion-MNIST", (CLOTHES,), train, held_out, concepts, partial(dit.DiT, shape), scale)


TASKS: dict[str, Callable[[pathlib.Path | None], Task]] = {"digits": digits, "fashion-mnist": fashion_mnist}
"""By name: the folder of the data, or None, -> Task."""


def load_task(name: str, smoke: bool, data_dir: pathlib.Path | None = None) -> Task:
    task = TASKS[name](data_dir)
    return smaller(task) if smoke else task
