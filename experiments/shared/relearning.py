"""The relearning attack: how fast fine-tuning brings back what was forgotten."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax import evaluation
from experiments.shared.forget_sets import Task
from experiments.shared.loop import taken
from experiments.shared.models.classifier import calibration
from experiments.shared.testbed import Testbed
from experiments.shared.training import batch_rows

Relearning = Callable[[Task, Any], dict[str, list[float]]]


class Attack(NamedTuple):
    """Row numbers [steps, batch] that are trained on, and those on which forgetting is measured."""

    batches: np.ndarray
    scored: np.ndarray


def make_relearning(testbed: Testbed) -> Relearning:
    """relearning(task, params) -> forget accuracies [11] along fine-tuning, compiled once for each task.

    "relearning on retain" uses retain data alone; "relearning on few" mixes in a few forget examples, half
    of every batch, and scores the others.
    """
    config, train = testbed.config, testbed.train
    optimizer = optax.sgd(config.relearning_rate, momentum=0.9)

    @jax.jit
    def curve(params, train, attack: Attack, retain):
        loss = lambda params, rows: testbed.losses.training(params, taken(train, rows)).mean()

        def accuracy(params):
            batches = calibration(train.x, retain)
            probabilities = testbed.classifier.predict(params, batches, train.x[attack.scored])
            return 100 * jnp.mean(probabilities.argmax(-1) == train.y[attack.scored])

        every = config.relearning_steps // 10
        return evaluation.relearning_curve(loss, accuracy, params, attack.batches, optimizer, every)

    def relearning(task: Task, params: Any) -> dict[str, list[float]]:
        few = np.random.default_rng((config.evaluation_seed, 8)).permutation(task.forget)
        few = few[: min(config.relearning_examples, len(few) // 2)]
        seed, steps, half = config.evaluation_seed, config.relearning_steps, config.batch_size // 2
        rows = batch_rows(task.retain, config.batch_size, steps, (seed, 9))
        attacks = {"relearning on retain": Attack(rows, task.forget)}
        if len(few):
            mixed = np.concatenate([batch_rows(few, half, steps, (seed, 10)), rows[:, half:]], 1)
            attacks["relearning on few"] = Attack(mixed, np.setdiff1d(task.forget, few))
        retain = task.retain[:5000]
        return {name: curve(params, train, attack, retain).tolist() for name, attack in attacks.items()}

    return relearning
