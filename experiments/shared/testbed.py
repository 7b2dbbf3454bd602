"""What methods are compared on: data, a classifier, trained models, and the compiled methods."""

import pathlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.run.files import write_whole
from experiments.shared.configs import Config, check
from experiments.shared.data import images
from experiments.shared.forget_sets import Task, make_task, wrong_labels
from experiments.shared.labels import LabelledExamples, label_losses
from experiments.shared.loop import (
    Run,
    Told,
    Unlearner,
    in_batches,
    make_plan,
    make_unlearn,
    make_unlearner,
    number_of_steps,
    taken,
)
from experiments.shared.methods.method import LossFunctions
from experiments.shared.models.classifier import MODELS, Classifier, calibration, make_classifier
from experiments.shared.peers import PEERS, Peer
from experiments.shared.report import Origin, read_origin
from experiments.shared.training import Trained, Trainer, augmented, make_trainer
from experiments.shared.unseen import unseen_targets

Progress = Callable[[str, float], None]
"""progress(what, part): so much more is done."""

OWN_SEED = 1000
"""Added to the seed of an original for the model that is trained briefly beside it."""

Models = dict[int, Trained]
"""Trained models by the seed of their training."""


class Outputs(NamedTuple):
    """Probabilities [n, classes] of one model on the three parts of the data."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Testbed(NamedTuple):
    """What all tasks and methods of a study share.

    Attributes:
      config: what it was made from.
      peers: the methods by name.
      data: the three parts of the data set.
      train: the training set on the device, with wrong labels beside the true ones.
      classifier, trainer: the model and its training.
      losses: of the model; the forget loss is that of the wrong labels.
      steps: of every unlearning run.
      unlearner: name of a method -> its compiled form for this classifier.
      told: (method, task, params, reference) -> what the method is told of a model that is to forget;
        reference() gives the parameters of the model that `briefly_trained` makes for the task.
      unlearn: (method, knobs, params, told, task, seed, report) -> Run.
      predict: (params, rows to retain) -> Outputs.
    """

    config: Config
    peers: Mapping[str, Peer]
    data: images.Data
    train: LabelledExamples
    classifier: Classifier
    losses: LossFunctions
    trainer: Trainer
    steps: int
    unlearner: Callable[[str], Unlearner]
    told: Callable[[str, Task, Any, Callable[[], Any]], Told]
    unlearn: Callable[..., Run]
    predict: Callable[[Any, np.ndarray], Outputs]


def make_testbed(config: Config, peers: Mapping[str, Peer] = PEERS) -> Testbed:
    """ValueError or OSError for a setting that cannot work, or data that is not there."""
    check(config, PEERS)
    pools = images.load(config.dataset, config.data_dir)
    data = images.partition(
        *pools,
        train_size=config.train_size,
        validation_size=config.validation_size,
        test_size=config.test_size,
        seed=config.data_seed,
    )
    classes = images.count_classes(*pools)
    classifier = make_classifier(MODELS[config.model](classes))
    losses = label_losses(classifier.apply)
    augment = augmented if config.training.augmented else None
    on_device = images.Data(*(images.Examples(*map(jnp.asarray, part)) for part in data))
    wrong = jnp.asarray(wrong_labels(data.train.y, classes, config.data_seed))
    train = LabelledExamples(*on_device.train, wrong, unseen=jnp.full(len(wrong), jnp.nan))

    @cache
    def unlearner(method: str) -> Unlearner:
        peer, settings = peers[method], {"weight_decay": config.weight_decay, "augmented": augment}
        return make_unlearner(peer.make, label_losses(classifier.apply, peer.forget_loss), **settings)

    @cache
    def compiled(method: str) -> Callable[..., Run]:
        return make_unlearn(unlearner(method))

    @jax.jit
    def mean_loss(params, batches):
        return jax.lax.map(lambda rows: losses.training(params, taken(train, rows)).mean(), batches).mean()

    def told(method, task: Task, params, reference) -> Told:
        peer, knobs, fields = peers[method], {}, {}
        if peer.is_told_baseline:
            knobs["baseline"] = mean_loss(params, in_batches(task.retain, config.batch_size))
        if peer.forget_loss == "unseen confidence":
            outputs = predict(params, task.retain), predict(reference(), task.retain)
            fields["unseen"] = jnp.asarray(
                unseen_targets(task, data, *(of[:2] for of in outputs)), jnp.float32
            )
        return Told(knobs, fields)

    def unlearn(method, knobs, params, told: Told, task: Task, seed: int, report=lambda part: None) -> Run:
        plan = make_plan(task.forget, task.retain, steps=steps, batch_size=config.batch_size, seed=seed)
        return compiled(method)(*told.to(knobs, train), params, plan, seed, report)

    @jax.jit
    def predict_all(params, batches, parts):
        return jax.tree.map(lambda x: classifier.predict(params, batches, x), parts)

    def predict(params, retain) -> Outputs:
        parts = Outputs(*(part.x for part in on_device))
        return jax.device_get(predict_all(params, calibration(train.x, retain), parts))

    trainer = make_trainer(classifier, config.training, config.side_by_side)
    steps = number_of_steps(config.unlearning_epochs, data.train.size, config.batch_size)
    return Testbed(
        config=config,
        peers=peers,
        data=data,
        train=train,
        classifier=classifier,
        losses=losses,
        trainer=trainer,
        steps=steps,
        unlearner=unlearner,
        told=told,
        unlearn=unlearn,
        predict=predict,
    )


def saved_task(testbed: Testbed, path: pathlib.Path, spec: str) -> Task:
    """A task whose forget set is kept in the run's folder, since its models belong to just that set."""
    file = path / "models" / f"forget-{spec}.npy".replace(":", "-")
    file.parent.mkdir(exist_ok=True)
    if file.exists():
        return Task.of(spec, np.load(file), testbed.data.train.size)
    task = make_task(spec, testbed.data, testbed.trainer, testbed.classifier, testbed.config.data_seed)
    np.save(file, task.forget)
    return task


def trained_models(
    testbed: Testbed,
    path: pathlib.Path,
    name: str,
    rows: np.ndarray,
    seeds: tuple[int, ...],
    progress: Progress,
    plan: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> Models:
    """A model of these rows for each seed, from its file in the run's folder where there is one.

    It is trained by the testbed's plan, or another one.
    """
    plan = plan or testbed.trainer.plan
    models = {}
    for seed in seeds:
        file = path / "models" / f"{name}-{seed}.msgpack".replace(":", "-").replace(" ", "-")
        report = lambda part, seed=seed: progress(f"training {name}, seed {seed}", part)
        if file.exists():
            report(1)
            shapes = jax.eval_shape(testbed.classifier.init, jax.random.key(0), testbed.train.x[:1])
            params, seconds = flax.serialization.from_bytes((shapes, 0.0), file.read_bytes())
            models[seed] = Trained(jax.tree.map(jnp.asarray, params), float(seconds))
            continue
        models[seed] = testbed.trainer.train(testbed.train, plan(rows, seed), seed, report)
        write_whole(file, flax.serialization.to_bytes(jax.device_get(tuple(models[seed]))))
    return models


def original_models(
    testbed: Testbed, path: pathlib.Path, seeds: tuple[int, ...], progress: Progress
) -> Models:
    """Models of the whole training set, which are to forget a part of it."""
    return trained_models(testbed, path, "original", np.arange(testbed.data.train.size), seeds, progress)


def briefly_trained(
    testbed: Testbed, path: pathlib.Path, task: Task, seed: int, progress: Progress
) -> Trained:
    """A model that saw the retain set for a sixth of the epochs, from a start of its own."""
    own, name = seed + OWN_SEED, f"{task.name} reference"
    return trained_models(testbed, path, name, task.retain, (own,), progress, brief_plan(testbed))[own]


def brief_plan(testbed: Testbed) -> Callable[[np.ndarray, int], np.ndarray]:
    """(rows, seed) -> a plan of a sixth of the epochs."""
    epochs = max(1, testbed.config.training.epochs // 6)
    return lambda rows, seed: testbed.trainer.plan(rows, seed)[:epochs]


def describe(path: pathlib.Path, testbed: Testbed) -> Origin:
    """Where the results in `path` come from."""
    of_steps = {
        "steps": testbed.steps,
        "forget and retain examples per step": testbed.config.batch_size,
    }
    origin = read_origin(path)
    del origin["config"]["runs_dir"]  # a place on this machine, and no part of the results
    return origin | of_steps | {"sizes": {part: one.size for part, one in testbed.data._asdict().items()}}
