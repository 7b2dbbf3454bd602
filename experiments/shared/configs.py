"""What a comparison of unlearning methods on classifiers depends on: the configurations, by name."""

import dataclasses
import pathlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal

from experiments.shared.peers import PEERS, Peer
from experiments.shared.training import Recipe

Dataset = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "image-folder"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare unlearning methods with retraining.

    Every method gets the same number of steps and of trials; its settings are chosen without looking at
    Retrain or at the test set; the chosen ones run over several seeds and are attacked. A new folder under
    --runs-dir receives tables.md, runs.csv, trials.csv, pictures, and report.html that shows it all.
    """

    dataset: Dataset
    """digits come with scikit-learn, Fashion-MNIST with Debian's dataset-fashion-mnist; the others
    are read from --data-dir in their standard files."""

    model: Literal["mlp", "cnn", "resnet8", "resnet8-batch", "resnet18"]
    """The classifier; its number of classes comes from the data."""

    training: Recipe
    """How the original, the retrained and the shadow models are trained."""

    tasks: tuple[str, ...]
    """What to forget: class:LABEL, subclass:LABEL (the largest of three clusters of a class),
    random:SHARE, memorised:SHARE (what the model knows only because it was trained on it)."""

    data_dir: pathlib.Path | None = None
    """Folder of the data set's files."""

    train_size: int | None = None
    """Training images, at random; None for all but the validation images."""

    validation_size: int = 360
    """Images of the training pool kept out of training, by which knobs are tuned."""

    test_size: int | None = None
    """Test images, at random; None for all. Only reports see them."""

    methods: tuple[str, ...] = tuple(name for name, peer in PEERS.items() if peer.package is None)
    """Which methods; Original and Retrain are always shown. Those of TorchJD need the extra "benchmarks"."""

    unlearning_epochs: int = 5
    """Passes over as many examples as the training set has, for every method and task."""

    batch_size: int = 64
    """Forget examples in each unlearning step, and as many retain examples."""

    weight_decay: float = 0.0
    """Of every method's SGD with momentum 0.9."""

    trials: int = 16
    """Settings tried for each method and task: its learning rate and its own knobs, log-uniform."""

    five_features: bool = True
    """Attack by all five features on the first unlearning seed; by confidence alone elsewhere."""

    data_seed: int = 0
    """Of the partition of the data, the forget sets and the wrong labels."""

    training_seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trained models."""

    tuning_seed: int = 100
    """Of the trials: their settings, their batches, and the model they start from, which is not reported."""

    unlearning_seeds: tuple[int, ...] = (200, 201)
    """Of the batches in the reported runs."""

    evaluation_seed: int = 300
    """Of the shadow models and the relearning attack."""

    shadows: int = 8
    """Pairs of shadow models in the likelihood-ratio attack on each task; 0 for none."""

    side_by_side: int = 16
    """Shadow models that are trained at a time, in one compiled call; fewer need less memory."""

    relearning_steps: int = 100
    """Steps of fine-tuning in each relearning attack, a multiple of ten; 0 for none."""

    relearning_rate: float = 0.01
    """Its learning rate, SGD with momentum 0.9."""

    relearning_examples: int = 20
    """Forget examples that the second relearning attack is given."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


def check(config: Config, peers: Mapping[str, Peer]) -> None:
    """ValueError that names the first option that cannot work."""
    for name in ("tasks", "training_seeds", "methods"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be given, each once; got {list(values)}")
    if unknown := set(config.methods) - set(peers):
        raise ValueError(f"methods: unknown {sorted(unknown)}; there are {', '.join(peers)}")
    for name in config.methods:
        package = peers[name].package
        if package is not None and find_spec(package) is None:
            raise ValueError(f'methods: {name} needs {package}: pip install -e ".[benchmarks]"')
    lowest = {"trials": 1, "unlearning_epochs": 1, "batch_size": 2, "side_by_side": 1}
    lowest |= {"relearning_examples": 1, "relearning_steps": 0, "shadows": 0}
    for name, low in lowest.items():
        if getattr(config, name) < low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(config, name)}")
    if config.shadows in (1, 2):
        raise ValueError(f"shadows must be 0, for no attack, or at least 3; got {config.shadows}")
    if config.relearning_steps % 10:
        raise ValueError(f"relearning_steps must be a multiple of ten, got {config.relearning_steps}")
    if config.tuning_seed in config.training_seeds:
        raise ValueError(f"tuning_seed {config.tuning_seed} must not be among the training_seeds")


# ResNet-18's recipe, published settings: 182 epochs, rate 0.1 divided by 10 after 91 and 136 epochs,
# batches of 256, SGD with momentum 0.9 and weight decay 5e-4, 45,000 training images.
PUBLISHED = Recipe(
    epochs=182,
    batch_size=256,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    drops=(0.5, 0.75),
    augmented=True,
)

FASHION_MNIST = Config(
    dataset="fashion-mnist",
    model="mlp",
    training=Recipe(epochs=30, batch_size=64, optimizer="adam", learning_rate=1e-3),
    tasks=("class:6", "subclass:6", "random:0.1", "random:0.5", "memorised:0.1"),
    trials=12,
    train_size=6000,
    validation_size=2000,
    test_size=2000,
    shadows=16,
)

# What a network with convolutions can be compared on in 100 minutes of two cores.
FASHION_MNIST_RESNET = dataclasses.replace(
    FASHION_MNIST,
    model="resnet8",
    training=Recipe(epochs=8, batch_size=64, optimizer="adam", learning_rate=2e-3, drops=(0.75,)),
    tasks=("random:0.1", "class:6"),
    methods=(
        "fine-tuning",
        "random labels",
        "SalUn",
        "exact surgery",
        "PDU",
        "TorchJD UPGrad",
        "TorchJD PCD",
        "EUPMU lagged",
        "EUPMU budget",
        "unseen confidence",
        "EUPMU lagged (unseen)",
        "EUPMU budget (unseen)",
    ),
    trials=4,
    train_size=12_000,
    unlearning_epochs=1,
    unlearning_seeds=(200,),
    shadows=4,
)

DIGITS = Config(
    dataset="digits",
    model="mlp",
    training=Recipe(epochs=40, batch_size=64, optimizer="adam", learning_rate=1e-3),
    tasks=("class:3", "subclass:3", "random:0.1", "random:0.5", "memorised:0.1"),
)

CIFAR10 = Config(
    dataset="cifar10",
    model="resnet18",
    training=PUBLISHED,
    tasks=("class:0", "random:0.1", "random:0.5"),
    validation_size=5000,
    batch_size=256,
    weight_decay=5e-4,
    # Shadow models and memorised:SHARE train dozens of networks: ask for them with --shadows, --tasks.
    shadows=0,
    side_by_side=2,
)

CONFIGS = {
    "digits": DIGITS,
    "fashion-mnist": FASHION_MNIST,
    "fashion-mnist-resnet": FASHION_MNIST_RESNET,
    "cifar10": CIFAR10,
    "cifar100": dataclasses.replace(CIFAR10, dataset="cifar100"),
    "svhn": dataclasses.replace(
        CIFAR10, dataset="svhn", training=dataclasses.replace(PUBLISHED, augmented=False)
    ),
    "image-folder": dataclasses.replace(CIFAR10, dataset="image-folder"),
    "smoke": dataclasses.replace(
        DIGITS,
        training=dataclasses.replace(DIGITS.training, epochs=10),
        tasks=("class:3", "random:0.1"),
        unlearning_epochs=1,
        trials=2,
        training_seeds=(0,),
        unlearning_seeds=(200,),
        shadows=4,
        relearning_steps=20,
    ),
}
"""Smoke checks every method on digits in two minutes; cifar10 is the full-size published recipe."""
