"""A trained network forgets one class within a stated budget: what this package is for, in a minute."""

import dataclasses
import json
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import eupmu_jax as eu
from eupmu_jax.cli import report
from eupmu_jax.objectives import cross_entropy, masked_mean, wrong_labels
from eupmu_jax.run.files import write_whole
from experiments.shared import command
from experiments.shared.data import images
from experiments.shared.models.classifier import MLP, Classifier, make_classifier
from experiments.shared.report import new_run_dir
from experiments.shared.training import Recipe, make_trainer

STEPS, BATCH, LEARNING_RATE = 400, 64, 1e-3
NAMES = {
    "digits": "zero one two three four five six seven eight nine".split(),
    "fashion-mnist": [
        *("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    ],
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Make a trained network forget one class, within a budget that you state.

    Trains a small network, lets eupmu_jax.unlearn remove a class while the loss on all others may rise by no
    more than the budget, and trains another network without that class for comparison. Prints what was
    forgotten and what it cost, and writes a report with curves to a new folder under --runs-dir.
    """

    dataset: Literal["digits", "fashion-mnist"] = "digits"
    """Which images: digits come with scikit-learn, Fashion-MNIST with Debian's dataset-fashion-mnist."""

    data_dir: pathlib.Path = images.FASHION_MNIST_DIR
    """Folder of Fashion-MNIST's four IDX files, gzipped or not."""

    forget: int = 3
    """The class to forget, 0 to 9."""

    budget: float = 0.1
    """How much the mean cross-entropy on the other classes' training images may rise, in nats."""

    seed: int = 0
    """Of the data split, the training and the unlearning."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


class Sets(NamedTuple):
    """Training images to forget and to retain, and unseen ones of the classes to retain."""

    forget: images.Examples
    retain: images.Examples
    test: images.Examples


def load(config: Config) -> tuple[images.Data, Sets]:
    """The data set, and its three parts by what should become of them."""
    eu.Budget(config.budget)
    if not 0 <= config.forget <= 9:
        raise ValueError(f"--forget must be a class from 0 to 9, got {config.forget}")
    pools = images.load(config.dataset, config.data_dir)
    size = None if config.dataset == "digits" else 6000
    data = images.partition(*pools, train_size=size, validation_size=300, test_size=None, seed=config.seed)
    is_forgotten = data.train.y == config.forget
    test = data.test[data.test.y != config.forget]
    return data, Sets(data.train[is_forgotten], data.train[~is_forgotten], test)


def unlearn(
    config: Config, model: Classifier, params: Any, sets: Sets, folder: pathlib.Path
) -> tuple[Any, eu.History]:
    """The network without the class: the part to copy for a model of your own."""

    def losses_fn(params, batch):
        forget, retain = batch["forget"], batch["retain"]
        # The forget loss is minimised: it is low where the network takes the images for something else.
        others = wrong_labels(batch["key"], forget.y, num_classes=10)
        forgotten = cross_entropy(model.apply(params, forget.x), others)
        known = cross_entropy(model.apply(params, retain.x), retain.y)
        return eu.Losses(forget=masked_mean(forgotten), retain=masked_mean(known))

    some = Sets(*(images.Examples(part.x[:1000], part.y[:1000]) for part in sets))

    def evaluate(params):
        return {f"{name}_accuracy": row["accuracy"] for name, row in measured(model, params, some).items()}

    return eu.unlearn(
        losses_fn, params, sets.forget, sets.retain, optax.adam(LEARNING_RATE), eu.Budget(config.budget),
        steps=STEPS, batch_size=BATCH, seed=config.seed, evaluate=evaluate, folder=folder,
    )  # fmt: skip


def measured(model: Classifier, params: Any, sets: Sets) -> dict[str, dict[str, float]]:
    """Accuracy and mean cross-entropy on the whole of each set."""
    apply = jax.jit(model.apply)
    found = {}
    for name, part in sets._asdict().items():
        logits = apply(params, part.x)
        right = jnp.argmax(logits, -1) == part.y
        loss = float(cross_entropy(logits, jnp.asarray(part.y)).mean())
        found[name] = {"accuracy": float(right.mean()), "cross_entropy": loss}
    return found


def show(
    console: Console,
    config: Config,
    sets: Sets,
    found: dict[str, dict[str, dict[str, float]]],
    promise: eu.Promise | None,
) -> None:
    """Before, after, and without the class; what was forgotten; what was promised and what was spent."""
    of_sets = {
        "forget": f"training images of class {config.forget}",
        "retain": "all other training images",
        "test": "unseen images of the other classes",
    }
    table = Table(title="Share of images that each network names correctly", title_justify="left")
    table.add_column("")
    for column in found:
        table.add_column(column, justify="right")
    for name, described in of_sets.items():
        table.add_row(described, *(f"{row[name]['accuracy']:.1%}" for row in found.values()))
    console.print(table)
    known = round(found["after"]["forget"]["accuracy"] * sets.forget.size)
    console.print(
        f"Forgotten: of the {sets.forget.size} images of class {config.forget} it still names {known}."
    )
    console.print(
        f"Promised: the loss on everything else rises by at most {config.budget} nats. {eu.verdict(promise)}"
    )


def main(config: Config) -> None:
    console = Console(highlight=False, soft_wrap=True)
    data, sets = load(config)
    name = NAMES[config.dataset][config.forget]
    console.print(
        f"The task: a network knows ten classes of images. It must forget class {config.forget} ({name}), "
        f"and its loss on the nine others may rise by at most {config.budget} nats."
    )
    model = make_classifier(MLP(10))
    trainer = make_trainer(model, Recipe(epochs=30, batch_size=64, optimizer="adam", learning_rate=1e-3))
    examples = images.Examples(*map(jnp.asarray, data.train))
    rows = {
        "before": np.arange(data.train.size),
        "trained without it": np.flatnonzero(data.train.y != config.forget),
    }
    trained = {}
    for name, of_training in rows.items():
        with console.status(f"Training the network: {name}"):
            plan = trainer.plan(of_training, config.seed)
            trained[name] = trainer.train(examples, plan, config.seed).params
    folder = new_run_dir(config.runs_dir, f"quickstart-{config.dataset}")
    unlearned, history = unlearn(config, model, trained["before"], sets, folder)

    networks = {"before": trained["before"], "after": unlearned, **trained}
    found = {name: measured(model, params, sets) for name, params in networks.items()}
    show(console, config, sets, found, history.promise)
    write_whole(folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
    page = report.write(folder)
    console.print(
        f"The picture: {folder / 'curves.png'}, both losses and the line that the budget draws. "
        f"The report: {page}\n"
        "Next: your own model, with the function unlearn of experiments/quickstart/__main__.py as a start; "
        "or all methods compared, python -m experiments.classification --smoke"
    )


if __name__ == "__main__":
    command.run(main, Config, resumable=False)
