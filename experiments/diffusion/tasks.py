"""What is drawn and what is to be forgotten: a data set, its concepts, the network, and how much is done."""

import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from experiments.diffusion import ready
from experiments.diffusion.judge import CNN, MLP
from experiments.shared.data import images
from experiments.shared.models.diffusion import dit, hybrid
from experiments.shared.models.diffusion.training import Pictures, Recipe

GUIDANCE = 1.5
"""Of all samples, unless a task or an attack says otherwise."""


class Concept(NamedTuple):
    """A value of an attribute that is to be forgotten, and the one that is to be drawn in its place."""

    attribute: int
    value: int
    instead: int
    near: tuple[int, ...] = ()
    """The values that look like it."""

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
      given: how many pictures the methods are given, the first of those that the models are trained on; None
        for all.
      guidance: of all samples, unless an attack says otherwise.
      reference_steps: of the same recipe, of the model that never saw the concept; None for as many.
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
    given: int | None = None
    guidance: float = GUIDANCE
    reference_steps: int | None = None


class Task(NamedTuple):
    """Pictures with attributes, and what is to be forgotten of them.

    Attributes:
      title: of the report.
      names: of the values of each attribute.
      train, held_out: pictures that the models are trained on, and others.
      concepts: the first is what all methods forget; where there are several, each has an adapter of its own.
      make: the network, from its random numbers.
      scale: how much is done.
      judge: the classifier of samples.
      ready: the files of models that need no training, by name.
    """

    title: str
    names: tuple[tuple[str, ...], ...]
    train: Pictures
    held_out: Pictures
    concepts: tuple[Concept, ...]
    make: Callable[[nnx.Rngs], Any]
    scale: Scale
    judge: type[MLP] | type[CNN] = MLP
    ready: Mapping[str, pathlib.Path] = {}

    @property
    def given(self) -> Pictures:
        """What the methods are given."""
        return self.train.taken(slice(self.scale.given))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.names))

    def name(self, concept: Concept) -> str:
        return self.names[concept.attribute][concept.value]


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
        recipe=Recipe(100, memory=0.9), reference_steps=None, judge_steps=100, steps=10, batch_size=32,
        adapter_steps=5, samples=30, relearning_steps=4, search_steps=4, methods=("EUPMU budget", "SalUn"),
    )  # fmt: skip
    train, held_out = task.train.taken(slice(640)), task.held_out.taken(slice(200))
    make = partial(dit.DiT, shape)
    return task._replace(train=train, held_out=held_out, make=make, scale=scale, ready={})


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


NEAR = {"trousers": ("dress",), "shirt": ("T-shirt", "pullover", "coat")}
"""What looks like it."""


def halved(pictures: Pictures) -> Pictures:
    """The means of 2x2 pixels, [N, H / 2, W / 2, C]."""
    amount, height, width, channels = pictures.x.shape
    blocks = pictures.x.reshape(amount, height // 2, 2, width // 2, 2, channels)
    return pictures._replace(x=blocks.mean((2, 4)))


OF_CLOTHES = (
    "EUPMU budget, near and far", "EUPMU budget", "EUPMU lagged", "constant weight", "redirect alone",
    "SalUn", "exact surgery", "ESD",
)  # fmt: skip
"""The methods that differ on digits: all of them would take half an hour on clothes."""


def fashion_mnist(data_dir: pathlib.Path | None, concept: str = "trousers") -> Task:
    """Fashion-MNIST at half its size, 14x14: trousers or shirts become bags."""
    pools = images.load("fashion-mnist", data_dir)
    data = images.partition(*pools, train_size=None, validation_size=1, test_size=1000, seed=0)
    scale = Scale(
        Recipe(3000, memory=0.998), judge_steps=3000, steps=100, rate=5e-4, batch_size=64, adapter_steps=0,
        adapter_rate=1e-2, samples=60, relearning_steps=20, relearning_rate=5e-4, search_steps=60,
        search_rate=3e-2, given=2000, guidance=3.0, reference_steps=1500, methods=OF_CLOTHES,
    )  # fmt: skip
    shape = dit.Config(size=14, channels=1, patch=2, width=64, layers=3, heads=4, labels=(10,))
    train, held_out = (halved(pictures_of(part)) for part in (data.train, data.test))
    number = CLOTHES.index
    forgotten = Concept(0, number(concept), number("bag"), tuple(map(number, NEAR[concept])))
    make = partial(dit.DiT, shape)
    return Task(
        "Fashion-MNIST", (CLOTHES,), train, held_out, (forgotten,), make, scale, CNN, ready.files(concept)
    )


THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(data_dir: pathlib.Path | None) -> Task:
    """CIFAR-10 for an accelerator, by the published recipe's numbers: airplanes become ships."""
    train, held_out = map(pictures_of, images.load("cifar10", data_dir))
    scale = Scale(
        Recipe(800_000, batch_size=128, rate=2e-4, memory=0.9999), judge_steps=20_000, steps=500, rate=1e-4,
        batch_size=128, adapter_steps=0, adapter_rate=1e-3, samples=500, relearning_steps=100,
        relearning_rate=1e-4, search_steps=500, search_rate=1e-2, guidance=2.0, methods=OF_CLOTHES,
    )  # fmt: skip
    shape = hybrid.Config(size=32, channels=3, stem=128, width=512, layers=8, heads=8, labels=(10,))
    forgotten = Concept(0, THINGS.index("airplane"), THINGS.index("ship"), (THINGS.index("bird"),))
    make = partial(hybrid.Hybrid, shape)
    return Task("CIFAR-10", (THINGS,), train, held_out, (forgotten,), make, scale, CNN)


TASKS: dict[str, Callable[[pathlib.Path | None], Task]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-shirt": partial(fashion_mnist, concept="shirt"),
    "cifar10": cifar10,
}
"""By name: the folder of the data, or None, -> Task."""


def load_task(name: str, smoke: bool, data_dir: pathlib.Path | None = None) -> Task:
    task = TASKS[name](data_dir)
    return smaller(task) if smoke else task
