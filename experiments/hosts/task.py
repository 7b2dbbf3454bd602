"""The task of every host: a network that knows ten digits forgets one, and may lose so much on the others."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import eupmu_jax as eu
from eupmu_jax.objectives import cross_entropy, unlikelihood

FORGET, TOTAL = 3, 0.1
Predict = Callable[[Any], Any]
"""Images [n, 64] -> logits [n, 10]."""


class Outcome(NamedTuple):
    """Images of the digit that are still named, of how many, and the rise of the retain loss."""

    named: int
    images: int
    rise: float


def load() -> dict[str, dict[str, np.ndarray]]:
    """scikit-learn's digits: those to forget, and all others."""
    x, y = (np.asarray(part) for part in load_digits(return_X_y=True))
    rows = {"forget": y == FORGET, "retain": y != FORGET}
    return {
        name: {"x": (x[chosen] / 16).astype(np.float32), "y": y[chosen].astype(np.int32)}
        for name, chosen in rows.items()
    }


SETS = load()


def batches(steps: int, size: int = 64, seed: int = 0) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Batches of both sets, each drawn independently of the one before."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = {name: rng.choice(len(part["y"]), size) for name, part in SETS.items()}
        yield {name: {k: v[rows[name]] for k, v in part.items()} for name, part in SETS.items()}


def knowing(predict: Predict, batch: Any) -> Any:
    """The loss of ordinary training, on both sets by their shares."""
    forget, retain = (cross_entropy(predict(batch[name]["x"]), batch[name]["y"]).mean() for name in SETS)
    return 0.1 * forget + 0.9 * retain


def losses(predict: Predict, batch: Any) -> eu.Losses:
    """The forget loss is minimised: it is low where the network takes the images for something else."""
    forget, retain = batch["forget"], batch["retain"]
    return eu.Losses(
        forget=unlikelihood(predict(forget["x"]), forget["y"]).mean(),
        retain=cross_entropy(predict(retain["x"]), retain["y"]).mean(),
    )


def retain_loss(predict: Predict) -> float:
    """Of all rows: where a budget starts, and where it is measured."""
    return float(jax.jit(partial(losses, predict))(SETS).retain)


def report(predict: Predict, before: float) -> Outcome:
    """Prints what was forgotten and what it cost, on all rows."""
    named = int(jnp.sum(jnp.argmax(predict(SETS["forget"]["x"]), -1) == FORGET))
    outcome = Outcome(named, len(SETS["forget"]["y"]), retain_loss(predict) - before)
    print(f"Forgotten: of the {outcome.images} images of the digit {FORGET} it still names {named}.")
    kept = "kept" if outcome.rise <= TOTAL else "not kept"
    print(f"The budget is {kept}: the loss on the others rose by {outcome.rise:.3f} of {TOTAL} nats.")
    return outcome
