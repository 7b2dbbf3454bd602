"""A comparison of methods with retraining: models are trained, unlearned over seeds, scored and recorded."""

import pathlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from eupmu_jax.evaluation.membership import FEATURES
from experiments.shared.configs import Config
from experiments.shared.forget_sets import Task, whole_class_of
from experiments.shared.loop import Knobs, Run, Told
from experiments.shared.records import Record, Records, RecordsByKey, of_kind, open_records
from experiments.shared.relearning import Relearning, make_relearning
from experiments.shared.report import ORIGINAL, OTHER_SEED, RETRAIN, Frame, note_session
from experiments.shared.scores import against_retrain, full_scores
from experiments.shared.testbed import (
    Models,
    Outputs,
    Progress,
    Testbed,
    briefly_trained,
    original_models,
    saved_task,
    trained_models,
)


class Setting(NamedTuple):
    """A method, by its name among the testbed's peers, and its knobs."""

    method: str
    knobs: dict[str, float]


class Comparison(NamedTuple):
    """One task and what methods are compared by on it; models are by the seed of their training.

    `told` is (method, seed) -> what the method is told of the original model.
    """

    testbed: Testbed
    records: Records
    progress: Progress
    relearning: Relearning
    task: Task
    originals: Models
    told: Callable[[str, int], Told]
    retrained: Models
    retrained_outputs: dict[int, Outputs]


class Unlearned(NamedTuple):
    """A model to be scored, what it took, and what else its record is to hold."""

    params: Any
    seconds: float
    more: Record


def run(testbed: Testbed, path: pathlib.Path, progress: Progress, settings: Mapping[str, Setting]) -> None:
    """Completes the records of methods with given knobs, by display name, in the run's folder.

    progress(what, part) reports parts of all that `amount_of_work` counts.
    """
    config = testbed.config
    with open_records(path / "records.jsonl") as records:
        note_session(path)
        tasks = [saved_task(testbed, path, spec) for spec in config.tasks]
        originals = original_models(testbed, path, config.training_seeds, progress)
        for task in tasks:
            comparison = start(testbed, path, records, task, originals, progress)
            for name, setting in settings.items():
                unlearn(comparison, name, setting)


def amount_of_work(config: Config, settings: int) -> float:
    """What the progress of `run` adds up to: one for each training and unlearning run."""
    seeds = len(config.training_seeds)
    runs = seeds * len(config.unlearning_seeds)
    return seeds + len(config.tasks) * (seeds + settings * runs)


def start(
    testbed: Testbed,
    path: pathlib.Path,
    records: Records,
    task: Task,
    originals: Models,
    progress: Progress,
) -> Comparison:
    """The comparison on a task, with its retrained models and the records of the references."""
    name, seeds = f"{task.name} retrain", list(originals)
    retrained = trained_models(testbed, path, name, task.retain, tuple(seeds), progress)
    outputs = {seed: testbed.predict(model.params, task.retain) for seed, model in retrained.items()}

    @cache
    def told(method: str, seed: int) -> Told:
        reference = lambda: reference_of(seed).params
        return testbed.told(method, task, originals[seed].params, reference)

    @cache
    def reference_of(seed: int):
        return briefly_trained(testbed, path, task, seed, progress)

    comparison = Comparison(
        testbed=testbed,
        records=records,
        progress=progress,
        relearning=make_relearning(testbed),
        task=task,
        originals=originals,
        told=told,
        retrained=retrained,
        retrained_outputs=outputs,
    )
    for seed, other in zip(seeds, seeds[1:] + seeds[:1], strict=True):
        score(comparison, RETRAIN, seed, 0, lambda seed=seed: Unlearned(*retrained[seed], {}))
        score(comparison, ORIGINAL, seed, 0, lambda seed=seed: Unlearned(*originals[seed], {}))
        if other != seed:
            score(comparison, OTHER_SEED, seed, 0, lambda other=other: Unlearned(*retrained[other], {}))
    return comparison


def score(
    comparison: Comparison, name: str, seed: int, unlearning_seed: int, make: Callable[[], Unlearned]
) -> None:
    """A record of the scores of what `make` makes; relearning on the first seeds alone."""
    testbed, task = comparison.testbed, comparison.task
    config = testbed.config
    first_batches = unlearning_seed in (0, config.unlearning_seeds[0])

    def piece() -> Record:
        params, seconds, more = make()
        outputs = testbed.predict(params, task.retain)
        features = FEATURES if first_batches and config.five_features else ("confidence",)
        scores = full_scores(testbed, task, outputs, comparison.retrained_outputs[seed], features)
        retrain = scores if name == RETRAIN else reference(comparison, RETRAIN, seed)
        attacked = seed == config.training_seeds[0] and first_batches and not scores["diverged"]
        curves = comparison.relearning(task, params) if attacked and config.relearning_steps else {}
        return scores | against_retrain(scores, retrain) | {"seconds": seconds} | curves | more

    comparison.records.get(("run", task.name, name, seed, unlearning_seed), piece)


def reference(comparison: Comparison, name: str, seed: int) -> Record:
    """The record of Original or Retrain for a training seed."""
    return comparison.records.by_key[("run", comparison.task.name, name, seed, 0)]


def run_method(
    comparison: Comparison,
    method: str,
    knobs: Knobs,
    seed: int,
    unlearning_seed: int,
    report: Callable[[float], None] = lambda part: None,
) -> Run:
    """One run of a method, from the original model of that training seed."""
    original, told = comparison.originals[seed].params, comparison.told(method, seed)
    return comparison.testbed.unlearn(method, knobs, original, told, comparison.task, unlearning_seed, report)


def unlearn(comparison: Comparison, name: str, setting: Setting, **more: str) -> None:
    """Records of a method with these knobs, for all training and unlearning seeds; they hold `more`, too."""
    testbed, task = comparison.testbed, comparison.task
    config, (method, knobs) = testbed.config, setting
    report = lambda part: comparison.progress(f"{task.name}: {name}", part)

    def make(seed: int, unlearning_seed: int) -> Unlearned:
        done = run_method(comparison, method, knobs, seed, unlearning_seed, report)
        parts = {key: np.array_split(values, min(50, len(values))) for key, values in done.history.items()}
        history = {key: [float(part.mean()) for part in split] for key, split in parts.items()}
        family = {"family": testbed.peers[method].family}
        return Unlearned(done.params, done.seconds, {"knobs": knobs, "history": history} | family | more)

    for seed in config.training_seeds:
        for unlearning_seed in config.unlearning_seeds:
            score(comparison, name, seed, unlearning_seed, lambda s=seed, u=unlearning_seed: make(s, u))


def runs_frame(records: RecordsByKey) -> Frame:
    """One row for each run."""
    rows = []
    for record in of_kind(records, "run"):
        _, task, method, training_seed, unlearning_seed = record["key"]
        scalars = {name: value for name, value in record.items() if isinstance(value, float | int)}
        of_classes = record.get("per_class", {})
        kept = [of_classes[label] for label in of_classes if int(label) != whole_class_of(task)]
        keys = {"task": task, "method": method}
        seeds = {"training_seed": training_seed, "unlearning_seed": unlearning_seed}
        knobs = {f"knob {name}": value for name, value in record.get("knobs", {}).items()}
        rows.append(keys | seeds | scalars | {"worst class": min(kept, default=np.nan)} | knobs)
    return pd.DataFrame(rows)
