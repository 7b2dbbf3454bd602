"""The strongest attack on the tuned methods: by likelihood ratios, with shadow models."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax import evaluation
from experiments.shared.forget_sets import Task
from experiments.shared.loop import Told, make_plan, make_unlearn_many
from experiments.shared.models.classifier import calibration
from experiments.shared.records import Record, Records
from experiments.shared.report import ORIGINAL, RETRAIN
from experiments.shared.testbed import OWN_SEED, Progress, Testbed, brief_plan

SHADOW_SHARE = 0.8


def attack_by_likelihood_ratio(testbed: Testbed, records: Records, task: Task, progress: Progress) -> None:
    """A record ("likelihood ratio", task, method) for each method, for Original and for Retrain.

    Every shadow pair has its own random 80% of the retain set; one of the two trains on the forget
    set as well and unlearns it with the method's tuned knobs, told what can be known of that shadow alone.
    Original skips the unlearning; Retrain is a second ensemble that never saw the forget set, from other
    seeds.
    """
    config, train = testbed.config, testbed.train
    names = [ORIGINAL, RETRAIN, *config.methods]
    if all(("likelihood ratio", task.name, name) in records.by_key for name in names):
        return
    rng = np.random.default_rng((config.evaluation_seed, 7))
    size = int(SHADOW_SHARE * len(task.retain))
    retain = [np.sort(rng.permutation(task.retain)[:size]) for _ in range(config.shadows)]

    def trained(with_forget: bool, offset: int, plan: Any = testbed.trainer.plan) -> Any:
        rows = [np.union1d(part, task.forget) if with_forget else part for part in retain]
        seeds = [config.evaluation_seed + offset + number for number in range(config.shadows)]
        plans = np.stack([plan(part, seed) for part, seed in zip(rows, seeds, strict=True)])
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        params = testbed.trainer.train_many(train, plans, keys)
        progress("likelihood-ratio attack: training shadows", 1)
        return params

    @jax.jit
    def predict(params, rows):
        def one(of_model):
            params, rows = of_model
            batches = calibration(train.x, rows)
            return testbed.classifier.predict(params, batches, train.x[task.forget])

        return jax.lax.map(one, (params, rows))

    def confidences(params: Any) -> list[np.ndarray] | None:
        """Of each shadow in each forget example's label; None where a model diverged."""
        probabilities = np.asarray(predict(params, np.stack(retain)))
        if not np.all(np.isfinite(probabilities)):
            return None
        return [evaluation.logit_confidence(p, testbed.data.train.y[task.forget]) for p in probabilities]

    originals, retrained = trained(True, 0), confidences(trained(False, 0))
    references = {ORIGINAL: lambda: originals, RETRAIN: lambda: trained(False, config.shadows)}
    plans = [
        make_plan(
            task.forget,
            part,
            steps=testbed.steps,
            batch_size=config.batch_size,
            seed=config.evaluation_seed + number,
        )
        for number, part in enumerate(retain)
    ]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *plans)
    keys = jax.random.split(jax.random.key(config.evaluation_seed), config.shadows)

    @cache
    def brief() -> Any:
        return trained(False, OWN_SEED, brief_plan(testbed))

    def told(method: str) -> Told:
        """Of every shadow."""
        of_shadow = lambda params, number: jax.tree.map(lambda leaf: leaf[number], params)
        each = [
            testbed.told(
                method,
                task._replace(retain=part),
                of_shadow(originals, number),
                lambda number=number: of_shadow(brief(), number),
            )
            for number, part in enumerate(retain)
        ]
        return jax.tree.map(lambda *of_each: jnp.stack(of_each), *each)

    def unlearned(method: str) -> Any:
        key = ("run", task.name, method, config.training_seeds[0], config.unlearning_seeds[0])
        unlearn_many = make_unlearn_many(testbed.unlearner(method), config.side_by_side)
        knobs = records.by_key[key]["knobs"]
        return unlearn_many(knobs, originals, keys, train, told(method), stacked)

    for name in names:

        def piece(name: str = name) -> Record:
            progress(f"likelihood-ratio attack: {name}", 0)
            of_method = confidences(references[name]() if name in references else unlearned(name))
            if of_method is None or retrained is None:
                return {"diverged": True}
            scores = evaluation.likelihood_ratio_attack(of_method, retrained)
            most_telling = np.sort(scores["per_example"])[-len(task.forget) // 10 :]
            figures = {name: value for name, value in scores.items() if name != "per_example"}
            return figures | {"worst_tenth": float(np.mean(most_telling))}

        records.get(("likelihood ratio", task.name, name), piece)
        progress(f"likelihood-ratio attack: {name}", name in config.methods)
