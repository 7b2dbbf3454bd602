"""One budget for all classes against one for each, steered by training or by held-out losses."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu
from eupmu_jax.evaluation import step_cost
from eupmu_jax.run.batches import retain_sets
from eupmu_jax.run.promise import REPAIR_ROWS, retained, within
from experiments.shared.forget_sets import Task
from experiments.shared.loop import momentum, taken
from experiments.shared.records import Record, Records
from experiments.shared.testbed import Models, Progress, Testbed

FORGET_BATCH, PER_CLASS = 64, 28
ORIGINAL = "before"
VARIANTS = {
    "one budget": (False, False),
    "one for each class": (True, False),
    "one budget, held-out feedback": (False, True),
    "one for each class, held-out feedback": (True, True),
}
"""Whether each class has its own, and whether the loss that steers is that of held-out images."""


class Images(NamedTuple):
    """Images [classes, PER_CLASS, ...] of the classes to be kept, and their labels."""

    x: Any
    y: Any


class Batch(NamedTuple):
    """The images to forget with wrong labels, and retained images to train on and to steer by."""

    forget: Any
    wrong: Any
    retain: Images
    held_out: Images


def make_losses(apply, each_class: bool, held_out: bool) -> Callable[[Any, Batch], eu.Losses]:
    """U of wrong labels; R, the mean over each class [K] or over all, of retained images.

    With held-out feedback R has the value of the held-out images and the gradient of the others: a
    forward pass more.
    """

    def class_losses(params, images):
        flat = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), images)
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, flat.x), flat.y)
        means = losses.reshape(images.y.shape).mean(1)
        return means if each_class else means.mean()

    def losses_fn(params, batch):
        forget = optax.softmax_cross_entropy_with_integer_labels(apply(params, batch.forget), batch.wrong)
        retain = class_losses(params, batch.retain)
        if held_out:
            retain += jax.lax.stop_gradient(class_losses(params, batch.held_out) - retain)
        return eu.Losses(forget.mean(), retain)

    return losses_fn


def run_all(
    testbed: Testbed,
    records: Records,
    task: Task,
    originals: Models,
    rates: tuple[float, ...],
    budget: float,
    progress: Progress,
) -> None:
    """A record for each variant, rate and model, and for each model before unlearning."""
    judge = make_judge(testbed, task)
    for seed, (original, _) in originals.items():
        records.get(("utilities", ORIGINAL, 0.0, seed), lambda p=original: judge(p))
        for name, (each_class, held_out) in VARIANTS.items():
            for rate in rates:
                key = ("utilities", name, rate, seed)
                work = lambda e=each_class, h=held_out, r=rate, p=original, s=seed: unlearn(
                    testbed, task, p, e, h, r, budget, s
                )
                records.get(key, work)
                progress(f"{name}, rate {rate:g}", 1)


def make_judge(testbed: Testbed, task: Task):
    """judge(params) -> losses and accuracies of each class that is kept, and of the forget set."""
    kept = kept_classes(testbed, task)
    parts = {"train": testbed.data.train[task.retain], "held_out": testbed.data.validation}
    parts["test"] = testbed.data.test

    @jax.jit
    def losses_and_hits(params, x, y):
        logits = testbed.classifier.apply(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses, logits.argmax(-1) == y

    def judge(params):
        found = {}
        for name, part in parts.items():
            losses, hits = losses_and_hits(params, part.x, part.y)
            for what, values in (("loss", np.asarray(losses)), ("accuracy", 100 * np.asarray(hits))):
                found[f"{name} {what}"] = [float(values[part.y == label].mean()) for label in kept]
        x = testbed.train.x[task.forget]
        found["forget_loss"] = float(losses_and_hits(params, x, testbed.train.wrong[task.forget])[0].mean())
        hits = losses_and_hits(params, x, testbed.train.y[task.forget])[1]
        return found | {"forget_accuracy": 100 * float(hits.mean()), "classes": kept}

    return judge


def before_unlearning(records: Iterable[Record]) -> dict[int, Record]:
    """The records of the models before unlearning, by the seed of their training."""
    keyed = ((record["key"], record) for record in records)
    return {seed: record for (_, name, _, seed), record in keyed if name == ORIGINAL}


def repaired(testbed: Testbed, task: Task, original, params, baseline, budget: float):
    """The parameters within their budgets as `unlearn` measures and repairs them, and the promise."""
    kept = jnp.asarray(kept_classes(testbed, task))
    each_class = np.ndim(baseline) == 1

    def losses_fn(params, batch):
        rows = batch["retain"]
        losses = testbed.losses.training(params, rows)
        of_class = (rows.y[:, None] == kept).astype(losses.dtype)
        means = eu.Mean(losses @ of_class, of_class.sum(0))
        if each_class:
            return eu.Losses(0.0, means)
        # The mean over the classes, as in training: each example counts by how rare its class is.
        return eu.Losses(0.0, jnp.mean(means.total / jnp.maximum(means.count, 1)))

    nothing_frozen = jax.tree.map(lambda leaf: None, original)
    size = min(REPAIR_ROWS // 2, task.retain.size) if each_class else task.retain.size
    rows = retain_sets(jax.device_get(taken(testbed.train, task.retain)), size)
    of = retained(losses_fn, nothing_frozen, None, rows, seed=0)
    return within(params, of, eu.Budget(budget, baseline=np.asarray(baseline)), lambda: original)


def kept_classes(testbed: Testbed, task: Task) -> list[int]:
    return np.unique(testbed.data.train.y[task.retain]).tolist()


def unlearn(
    testbed: Testbed, task: Task, original, each_class: bool, held_out: bool, rate, budget, seed: int
) -> dict[str, Any]:
    """One run of EUPMU with a budget, judged; and the FLOPs of one of its steps.

    It is repaired on the training images; what held-out feedback steers has no promise there.
    """
    kept = kept_classes(testbed, task)
    before = make_judge(testbed, task)(original)["held_out loss" if held_out else "train loss"]
    baseline = jnp.asarray(before if each_class else np.mean(before), jnp.float32)
    tx = eu.eupmu(
        make_losses(testbed.classifier.apply, each_class, held_out),
        momentum(rate),
        eu.Budget(budget, baseline=baseline),
        initial_multiplier=jnp.full(len(kept), 1 / len(kept)) if each_class else 1.0,
    )
    validation = jax.tree.map(jnp.asarray, testbed.data.validation)
    retain_y = testbed.data.train.y[task.retain]
    rng = np.random.default_rng((seed, 7))

    def rows(of: Callable[[int], np.ndarray]):
        drawn = [rng.choice(of(label), (testbed.steps, PER_CLASS)) for label in kept]
        return np.stack(drawn, 1).astype(np.int32)

    plan = (
        rng.choice(task.forget, (testbed.steps, FORGET_BATCH)).astype(np.int32),
        rows(lambda label: task.retain[retain_y == label]),
        rows(lambda label: np.flatnonzero(testbed.data.validation.y == label)),
    )

    def make_batch(forget, retain, feedback):
        images = Images(testbed.train.x[retain], testbed.train.y[retain])
        others = Images(validation.x[feedback], validation.y[feedback])
        return Batch(testbed.train.x[forget], testbed.train.wrong[forget], images, others)

    def step(carry, inputs):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=make_batch(*inputs))
        return (optax.apply_updates(params, updates), state), eu.surgery_info(state)

    start = (original, tx.init(original))
    flops = step_cost(step, start, jax.tree.map(lambda leaf: leaf[0], plan))["flops"]
    (params, _), seen = jax.jit(lambda start: jax.lax.scan(step, start, plan))(start)
    promised = {}
    if not held_out:
        params, promise = repaired(testbed, task, original, params, baseline, budget)
        promised = {"repair_steps": promise.repair_steps, "holds": promise.holds}
    found = make_judge(testbed, task)(params) | promised
    return found | {"flops": flops, "multipliers": np.asarray(seen.multiplier[-1]).ravel().tolist()}
