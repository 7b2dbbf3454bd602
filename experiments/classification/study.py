"""The study: train, tune blindly, unlearn over seeds, attack; every finished piece is a record."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from experiments.classification.attacks import attack_by_likelihood_ratio, make_relearning
from experiments.classification.bench import Bench, Outputs, Records, make_bench
from experiments.classification.configs import Config
from experiments.classification.scores import accuracies, against_retrain, full_scores, step_cost
from experiments.classification.tuning import blind_score, settings_to_try
from experiments.forget_sets import Task, make_task
from experiments.peers import PEERS, Peer

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


def run(
    config: Config,
    path: pathlib.Path,
    progress: Progress,
    *,
    entries: Entries | None = None,
    peers: Mapping[str, Peer] = PEERS,
) -> Bench:
    """Completes the records in `path`; progress(what, parts done of all that `amount_of_work` counts).

    `entries` name methods, out of `peers`, with given knobs, to be run in place of the config's methods and
    their tuning.
    """
    bench, records = make_bench(config, peers), Records(path / "records.jsonl")
    relearning = make_relearning(bench)
    everything = np.arange(bench.data.train.size)
    tasks = [
        make_task(spec, bench.data, bench.trainer, bench.classifier, config.data_seed)
        for spec in config.tasks
    ]
    originals = trained(bench, path, "original", everything, progress)
    for task in tasks:
        retrained = trained(bench, path, f"{task.name} retrain", task.retain, progress)
        outputs = {seed: bench.predict(params, task.retain) for seed, (params, _) in retrained.items()}
        desk = Desk(bench, records, progress, relearning, task, originals, retrained, outputs)
        references(desk)
        if entries is not None:
            for name, (method, knobs) in entries.items():
                unlearn(desk, name, method, knobs)
        else:
            for method in config.methods:
                tune_and_unlearn(desk, method)
    for name in entries or config.methods:
        measure_cost(bench, records, tasks[0], name, entries[name][0] if entries else name, originals)
    attacked = next((task for task in tasks if task.name.startswith("random:")), None)
    if attacked and config.shadows and entries is None:
        attack_by_likelihood_ratio(bench, records, attacked, progress)
    return bench


def amount_of_work(config: Config, entries: Entries | None = None) -> float:
    """What the progress of `run` adds up to: one for each training and each unlearning run."""
    seeds = len(config.training_seeds)
    runs = seeds * len(config.unlearning_seeds)
    if entries is not None:
        return seeds + len(config.tasks) * (seeds + len(entries) * runs)
    names = len(config.methods) + sum(method.startswith("EUPMU") for method in config.methods)
    each_task = seeds + len(config.methods) * config.trials + names * runs
    attacked = any(spec.startswith("random:") for spec in config.tasks) and config.shadows
    return seeds + len(config.tasks) * each_task + (3 + len(config.methods) if attacked else 0)


def trained(bench: Bench, path: pathlib.Path, name: str, rows: np.ndarray, progress: Progress) -> Models:
    """A model for each training seed, from its file where there is one."""
    models = {}
    (path / "models").mkdir(exist_ok=True)
    for seed in bench.config.training_seeds:
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


def reported(desk: Desk, name: str, seed: int, unlearning_seed: int, make) -> None:
    """A record of the scores of make() -> (params, seconds, more); relearning on the first seeds alone."""
    first_seeds = (desk.bench.config.training_seeds[0], desk.bench.config.unlearning_seeds[0])

    def piece():
        params, seconds, more = make()
        outputs = desk.bench.predict(params, desk.task.retain)
        scores = full_scores(desk.bench, desk.task, outputs, desk.retrained_outputs[seed])
        retrain = scores if name == "Retrain" else record_of(desk, "Retrain", seed)
        is_first = seed == first_seeds[0] and unlearning_seed in (0, first_seeds[1])
        curves = desk.relearning(desk.task, params) if is_first and not scores["diverged"] else {}
        return scores | against_retrain(scores, retrain) | {"seconds": seconds} | curves | more

    desk.records.get(("run", desk.task.name, name, seed, unlearning_seed), piece)


def record_of(desk: Desk, reference: str, seed: int) -> dict[str, Any]:
    return desk.records.by_key[("run", desk.task.name, reference, seed, 0)]


def references(desk: Desk) -> None:
    """Records of Retrain and Original, to which all others are compared."""
    for seed in desk.bench.config.training_seeds:
        for name, models in (("Retrain", desk.retrained), ("Original", desk.originals)):
            reported(desk, name, seed, 0, lambda models=models, seed=seed: (*models[seed], {}))


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
    """The best trial of a method by the blind rule, on the first training seed."""
    bench, task = desk.bench, desk.task
    first = bench.config.training_seeds[0]
    report = lambda part: desk.progress(f"{task.name}: tuning {method}", part)

    def trial(knobs):
        start = desk.originals[first][0]
        done = bench.unlearn(method, knobs, start, task, bench.config.tuning_seed, report)
        scores = accuracies(bench, task, bench.predict(done.params, task.retain))
        score = blind_score(scores, record_of(desk, "Original", first), task.whole_class is not None)
        late = float(np.mean(done.history["multiplier"][-(bench.steps // 2) :]))
        return scores | {"knobs": knobs, "late_multiplier": late, "score": score}

    settings = settings_to_try(bench.peers[method], bench.config.trials, bench.config.tuning_seed)
    trials = [
        desk.records.get(("trial", task.name, method, number), lambda knobs=knobs: trial(knobs))
        for number, knobs in enumerate(settings)
    ]
    return min(trials, key=lambda one: one["score"])


def tune_and_unlearn(desk: Desk, method: str) -> None:
    """A tuned method; for EUPMU also the constant weight at which its multiplier settled."""
    best = tune(desk, method)
    unlearn(desk, method, method, best["knobs"])
    if method.startswith("EUPMU"):
        constant = "random labels (log)" if method.endswith("(log)") else "random labels"
        knobs = {"learning_rate": best["knobs"]["learning_rate"], "weight": best["late_multiplier"]}
        unlearn(desk, f"constant at {method}", constant, knobs)


def measure_cost(
    bench: Bench, records: Records, task: Task, name: str, method: str, originals: Models
) -> None:
    """A record of a step's cost, and of the time of a run on the first task: the best of three."""
    first = bench.config.training_seeds[0]
    knobs = records.by_key[("run", task.name, name, first, bench.config.unlearning_seeds[0])]["knobs"]

    def piece():
        start = originals[first][0]
        seconds = [bench.unlearn(method, knobs, start, task, seed).seconds for seed in range(3)]
        return step_cost(bench, method) | {"seconds": min(seconds)}

    records.get(("cost", name), piece)
