"""What a study works with: data, classifier, compiled methods, and the records of what is done."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.classification.configs import Config, check
from experiments.shared.data import images
from experiments.shared.forget_sets import Task, wrong_labels
from experiments.shared.loop import Run, Unlearner, make_plan, make_unlearn, make_unlearner, number_of_steps
from experiments.shared.methods import PEERS, Peer
from experiments.shared.models.classifier import (
    MODELS,
    Classifier,
    Trainer,
    calibration,
    make_classifier,
    make_trainer,
)


class Bench(NamedTuple):
    """What all tasks and methods share; `train` is the training set on the device."""

    config: Config
    peers: Mapping[str, Peer]
    data: images.Data
    train: images.Examples
    wrong: jax.Array
    classifier: Classifier
    trainer: Trainer
    steps: int
    unlearner: Callable[[str], Unlearner]
    unlearn: Callable[..., Run]
    predict: Callable[..., "Outputs"]


class Outputs(NamedTuple):
    """Probabilities [n, classes] of one model on the three parts of the data."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def make_bench(config: Config, peers: Mapping[str, Peer] = PEERS) -> Bench:
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
    on_device = images.Data(*(images.Examples(*map(jnp.asarray, part)) for part in data))

    @cache
    def unlearner(method):
        settings = {"weight_decay": config.weight_decay, "augmented": config.training.augmented}
        return make_unlearner(peers[method], classifier.apply, **settings)

    @cache
    def compiled(method):
        return make_unlearn(unlearner(method))

    wrong = jnp.asarray(wrong_labels(data.train.y, classes, config.data_seed))

    def unlearn(method, knobs, params, task: Task, seed: int, report=lambda part: None):
        plan = make_plan(task.forget, task.retain, steps=steps, batch_size=config.batch_size, seed=seed)
        return compiled(method)(knobs, params, on_device.train, wrong, plan, seed, report)

    @jax.jit
    def predict_all(params, batches, parts):
        return jax.tree.map(lambda x: classifier.predict(params, batches, x), parts)

    def predict(params, retain):
        parts = Outputs(*(part.x for part in on_device))
        return jax.device_get(predict_all(params, calibration(on_device.train, retain), parts))

    trainer = make_trainer(classifier, config.training, config.side_by_side)
    steps = number_of_steps(config.unlearning_epochs, data.train.size, config.batch_size)
    models = (classifier, trainer, steps, unlearner, unlearn, predict)
    return Bench(config, peers, data, on_device.train, wrong, *models)


RecordsByKey = dict[tuple, dict[str, Any]]


class Records(NamedTuple):
    """The finished pieces of a study by their keys, and the file of JSON lines from which it resumes."""

    by_key: RecordsByKey
    file: BinaryIO

    def get(self, key: tuple, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of that key, made and written now if there is none yet."""
        if key not in self.by_key:
            record = {"key": key} | make()
            self.file.write(f"{json.dumps(record)}\n".encode())
            self.file.flush()
            self.by_key[key] = record
        return self.by_key[key]


@contextlib.contextmanager
def open_records(path: pathlib.Path) -> Iterator[Records]:
    """The records, for this process alone to add to; ValueError if another one does."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to {path}: wait for it, or stop it") from error
        file.seek(0)
        # A run that was killed may have left half a line.
        file.truncate(file.read().rfind(b"\n") + 1)
        yield Records(read_records(path), file)


def read_records(path: pathlib.Path) -> RecordsByKey:
    """Finished records by key, in the order they were made; ValueError if the file is damaged."""
    records = {}
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                record = json.loads(line)
                records[tuple(record["key"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {number} is damaged; delete it to do that piece again"
                ) from error
    return records


def of_kind(records: RecordsByKey, kind: str) -> list[dict[str, Any]]:
    return [record for key, record in records.items() if key[0] == kind]
