"""The study: train, tune blindly, unlearn over seeds, attack; every finished piece is a record."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.evaluation.membership import FEATURES
from experiments.classification.attacks import attack_by_likelihood_ratio, make_relearning
from experiments.classification.bench import Bench, Outputs, Records, open_records
from experiments.classification.configs import Config
from experiments.classification.scores import accuracies, against_retrain, full_scores, step_cost
from experiments.classification.tuning import blind_score, settings_to_try
from experiments.shared.forget_sets import Task, make_task
from experiments.shared.report import OTHER_SEED, note_session

Entries = Mapping[str, tuple[str, dict[str, float]]]
Progress = Callable[[str, float], None]
Models = dict[int, tuple[Any, float]]


class Desk(NamedTuple):
    """One task and what work on it needs; models are by training seed, with the seconds they took."""

    bench: Bench
    records: Records
    progress: Progress
    relearning: Callable[[Task, Any], dict[str, list[float]]]
    task: Task
    originals: Models
    retrained: Models
    retrained_outputs: dict[int, Outputs]


def run(bench: Bench, path: pathlib.Path, progress: Progress) -> None:
    """Completes the whole study's records in `path`, all methods tuned.

    progress(what, part) reports parts of all that `amount_of_work` counts.
    """
    config = bench.config
    with open_records(path / "records.jsonl") as records:
        note_session(path)
        seeds = (config.tuning_seed, *config.training_seeds)
        tasks = [saved_task(bench, path, spec) for spec in config.tasks]
        originals = trained(bench, path, "original", np.arange(bench.data.train.size), seeds, progress)
        for task in tasks:
            desk = make_desk(bench, path, records, task, originals, progress)
            for method in config.methods:
                tune_and_unlearn(desk, method)
        for method in config.methods:
            measure_cost(bench, records, tasks[0], method, originals)
        attacked = next((task for task in tasks if task.name.startswith("random:")), None)
        if attacked and config.shadows:
            attack_by_likelihood_ratio(bench, records, attacked, progress)


def run_entries(bench: Bench, path: pathlib.Path, progress: Progress, entries: Entries) -> None:
    """Completes the records of methods with given knobs: name -> (a name in the bench's peers, its knobs)."""
    config = bench.config
    with open_records(path / "records.jsonl") as records:
        note_session(path)
        tasks = [saved_task(bench, path, spec) for spec in config.tasks]
        everything = np.arange(bench.data.train.size)
        originals = trained(bench, path, "original", everything, config.training_seeds, progress)
        for task in tasks:
            desk = make_desk(bench, path, records, task, originals, progress)
            for name, (method, knobs) in entries.items():
                unlearn(desk, name, method, knobs)


def amount_of_work(config: Config, entries: int | None = None) -> float:
    """What the progress of `run` (`run_entries`) adds up to: one for each training and unlearning run."""
    seeds = len(config.training_seeds)
    runs = seeds * len(config.unlearning_seeds)
    if entries is not None:
        return seeds + len(config.tasks) * (seeds + entries * runs)
    names = len(config.methods) + sum(method.startswith("EUPMU") for method in config.methods)
    each_task = seeds + 1 + len(config.methods) * config.trials + names * runs
    attacked = any(spec.startswith("random:") for spec in config.tasks) and config.shadows
    return seeds + 1 + len(config.tasks) * each_task + (3 + len(config.methods) if attacked else 0)


def saved_task(bench: Bench, path: pathlib.Path, spec: str) -> Task:
    """A task whose forget set is kept beside the records, since its models belong to just that set."""
    file = path / "models" / f"forget-{spec}.npy".replace(":", "-")
    file.parent.mkdir(exist_ok=True)
    if file.exists():
        return Task.of(spec, np.load(file), bench.data.train.size)
    task = make_task(spec, bench.data, bench.trainer, bench.classifier, bench.config.data_seed)
    np.save(file, task.forget)
    return task


def trained(
    bench: Bench, path: pathlib.Path, name: str, rows: np.ndarray, seeds: tuple[int, ...], progress: Progress
) -> Models:
    """A model for each seed, from its file where there is one."""
    models = {}
    for seed in seeds:
        file = path / "models" / f"{name}-{seed}.msgpack".replace(":", "-").replace(" ", "-")
        report = lambda part, seed=seed: progress(f"training {name}, seed {seed}", part)
        if file.exists():
            report(1)
            shapes = jax.eval_shape(bench.classifier.init, jax.random.key(0), bench.train.x[:1])
            params, seconds = flax.serialization.from_bytes((shapes, 0.0), file.read_bytes())
            models[seed] = jax.tree.map(jnp.asarray, params), seconds
            continue
        models[seed] = bench.trainer.train(bench.train, bench.trainer.plan(rows, seed), seed, report)
        partial = file.with_suffix(".partial")
        partial.write_bytes(flax.serialization.to_bytes(jax.device_get(models[seed])))
        partial.replace(file)
    return models


def make_desk(bench: Bench, path, records: Records, task: Task, originals: Models, progress) -> Desk:
    """The desk of a task, with its retrained models and the records of both references."""
    retrained = trained(bench, path, f"{task.name} retrain", task.retain, tuple(originals), progress)
    outputs = {seed: bench.predict(params, task.retain) for seed, (params, _) in retrained.items()}
    desk = Desk(bench, records, progress, make_relearning(bench), task, originals, retrained, outputs)
    seeds = list(originals)
    for seed, other in zip(seeds, seeds[1:] + seeds[:1], strict=True):
        reported(desk, "Retrain", seed, 0, lambda seed=seed: (*retrained[seed], {}))
        reported(desk, "Original", seed, 0, lambda seed=seed: (*originals[seed], {}))
        if other != seed:
            reported(desk, OTHER_SEED, seed, 0, lambda other=other: (*retrained[other], {}))
    return desk


def reported(desk: Desk, name: str, seed: int, unlearning_seed: int, make) -> None:
    """A record of the scores of make() -> (params, seconds, more); relearning on the first seeds alone."""
    config = desk.bench.config
    first_batches = unlearning_seed in (0, config.unlearning_seeds[0])

    def piece():
        params, seconds, more = make()
        outputs = desk.bench.predict(params, desk.task.retain)
        features = FEATURES if first_batches and config.five_features else ("confidence",)
        scores = full_scores(desk.bench, desk.task, outputs, desk.retrained_outputs[seed], features)
        retrain = scores if name == "Retrain" else record_of(desk, "Retrain", seed)
        attacked = seed == config.training_seeds[0] and first_batches and not scores["diverged"]
        curves = desk.relearning(desk.task, params) if attacked and config.relearning_steps else {}
        return scores | against_retrain(scores, retrain) | {"seconds": seconds} | curves | more

    desk.records.get(("run", desk.task.name, name, seed, unlearning_seed), piece)


def record_of(desk: Desk, reference: str, seed: int) -> dict[str, Any]:
    return desk.records.by_key[("run", desk.task.name, reference, seed, 0)]


def unlearn(desk: Desk, name: str, method: str, knobs: dict[str, float]) -> None:
    """Records of a method with these knobs, for all training and unlearning seeds."""
    config = desk.bench.config
    report = lambda part: desk.progress(f"{desk.task.name}: {name}", part)

    def make(seed, unlearning_seed):
        start = desk.originals[seed][0]
        done = desk.bench.unlearn(method, knobs, start, desk.task, unlearning_seed, report)
        parts = {key: np.array_split(values, min(50, len(values))) for key, values in done.history.items()}
        history = {key: [float(part.mean()) for part in split] for key, split in parts.items()}
        return done.params, done.seconds, {"knobs": knobs, "history": history}

    for seed in config.training_seeds:
        for unlearning_seed in config.unlearning_seeds:
            seeds = (seed, unlearning_seed)
            reported(desk, name, *seeds, lambda seeds=seeds: make(*seeds))


def tune(desk: Desk, method: str) -> dict[str, Any]:
    """The best trial of a method by the blind rule, from the model of the tuning seed."""
    bench, task, seed = desk.bench, desk.task, desk.bench.config.tuning_seed
    report = lambda part: desk.progress(f"{task.name}: tuning {method}", part)

    def trial(knobs):
        done = bench.unlearn(method, knobs, desk.originals[seed][0], task, seed, report)
        scores = accuracies(bench, task, bench.predict(done.params, task.retain))
        score = blind_score(scores, record_of(desk, "Original", seed), task.whole_class is not None)
        late = float(np.mean(done.history["multiplier"][-(bench.steps // 2) :]))
        return scores | {"knobs": knobs, "late_multiplier": late, "score": score}

    trials = []
    for number, knobs in enumerate(settings_to_try(bench.peers[method], bench.config.trials, seed)):
        key = ("trial", task.name, method, number)
        trials.append(desk.records.get(key, lambda knobs=knobs: trial(knobs)))
        if trials[-1]["knobs"] != knobs:
            raise ValueError(f"the records of {method} were made by other code: start a new run")
    return min(trials, key=lambda one: one["score"])


def tune_and_unlearn(desk: Desk, method: str) -> None:
    """A tuned method; for EUPMU also the constant weight at which its multiplier settled."""
    best = tune(desk, method)
    unlearn(desk, method, method, best["knobs"])
    if method.startswith("EUPMU"):
        constant = "random labels (log)" if method.endswith("(log)") else "random labels"
        knobs = {"learning_rate": best["knobs"]["learning_rate"], "weight": best["late_multiplier"]}
        unlearn(desk, f"constant at {method}", constant, knobs)


def measure_cost(bench: Bench, records: Records, task: Task, method: str, originals: Models) -> None:
    """A record of a step's cost, and of the time of a run on the first task: the best of three."""
    seed = bench.config.training_seeds[0]
    knobs = records.by_key[("run", task.name, method, seed, bench.config.unlearning_seeds[0])]["knobs"]

    def piece():
        seconds = [bench.unlearn(method, knobs, originals[seed][0], task, s).seconds for s in range(3)]
        return step_cost(bench, method) | {"seconds": min(seconds)}

    records.get(("cost", method), piece)
