"""The study: train, tune blindly, unlearn over seeds, attack; every finished piece is a record."""

import pathlib

import numpy as np

from experiments.classification.attacks import attack_by_likelihood_ratio
from experiments.classification.costs import step_cost
from experiments.classification.targets import measure_targets
from experiments.classification.tuning import blind_score, settings_to_try
from experiments.shared import comparison
from experiments.shared.comparison import Comparison, Setting, reference, run_method, unlearn
from experiments.shared.configs import Config
from experiments.shared.loop import Knobs
from experiments.shared.peers import PEERS
from experiments.shared.records import Record, open_records
from experiments.shared.report import ORIGINAL, note_session
from experiments.shared.scores import accuracies
from experiments.shared.testbed import Progress, Testbed, original_models, saved_task


def run(testbed: Testbed, path: pathlib.Path, progress: Progress) -> None:
    """Completes the whole study's records in `path`, all methods tuned.

    progress(what, part) reports parts of all that `amount_of_work` counts.
    """
    config = testbed.config
    with open_records(path / "records.jsonl") as records:
        note_session(path)
        seeds = (config.tuning_seed, *config.training_seeds)
        tasks = [saved_task(testbed, path, spec) for spec in config.tasks]
        originals = original_models(testbed, path, seeds, progress)
        for task in tasks:
            on_task = comparison.start(testbed, path, records, task, originals, progress)
            for method in config.methods:
                tune_and_unlearn(on_task, method)
                if task is tasks[0]:
                    measure_cost(on_task, method)
            measure_targets(on_task)
            if config.shadows:
                attack_by_likelihood_ratio(testbed, records, task, progress)


def amount_of_work(config: Config) -> float:
    """What the progress of `run` adds up to: one for each training and unlearning run."""
    seeds = len(config.training_seeds)
    runs = seeds * len(config.unlearning_seeds)
    names = len(config.methods) + sum(PEERS[method].constant is not None for method in config.methods)
    referred = any(PEERS[method].forget_loss == "unseen confidence" for method in config.methods)
    each_task = (seeds + 1) * (1 + referred) + len(config.methods) * config.trials + names * runs
    attack = 3 + referred + len(config.methods) if config.shadows else 0
    return seeds + 1 + len(config.tasks) * (each_task + attack)


def tune(on_task: Comparison, method: str) -> Record:
    """The best trial of a method by the blind rule, from the model of the tuning seed."""
    testbed, task = on_task.testbed, on_task.task
    config, seed = testbed.config, testbed.config.tuning_seed
    report = lambda part: on_task.progress(f"{task.name}: tuning {method}", part)

    def trial(knobs: Knobs) -> Record:
        done = run_method(on_task, method, knobs, seed, seed, report)
        scores = accuracies(testbed, task, testbed.predict(done.params, task.retain))
        score = blind_score(scores, reference(on_task, ORIGINAL, seed), task.whole_class is not None)
        late = float(np.mean(done.history["multiplier"][-(testbed.steps // 2) :]))
        return scores | {"knobs": knobs, "late_multiplier": late, "score": score}

    trials = []
    for number, knobs in enumerate(settings_to_try(testbed.peers[method], config.trials, seed)):
        key = ("trial", task.name, method, number)
        trials.append(on_task.records.get(key, lambda knobs=knobs: trial(knobs)))
        if trials[-1]["knobs"] != knobs:
            raise ValueError(f"the records of {method} were made by other code: start a new run")
    return min(trials, key=lambda one: one["score"])


def tune_and_unlearn(on_task: Comparison, method: str) -> None:
    """A tuned method; if its multiplier settles, also the constant weight at which it did."""
    best = tune(on_task, method)
    unlearn(on_task, method, Setting(method, best["knobs"]))
    constant = on_task.testbed.peers[method].constant
    if constant is not None:
        knobs = {"learning_rate": best["knobs"]["learning_rate"], "weight": best["late_multiplier"]}
        unlearn(on_task, f"constant at {method}", Setting(constant, knobs), fixed_point_of=method)


def measure_cost(on_task: Comparison, method: str) -> None:
    """A record of a step's cost, and of the time of a run on the task: the best of three."""
    config, records = on_task.testbed.config, on_task.records
    seed = config.training_seeds[0]
    knobs = records.by_key[("run", on_task.task.name, method, seed, config.unlearning_seeds[0])]["knobs"]

    def piece() -> Record:
        seconds = min(run_method(on_task, method, knobs, seed, batches).seconds for batches in range(3))
        return step_cost(on_task.testbed, method) | {"seconds": seconds}

    records.get(("cost", method), piece)
