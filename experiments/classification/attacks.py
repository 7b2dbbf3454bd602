"""The stronger attacks on the tuned methods: shadow models, and relearning."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax import evaluation
from experiments.classification.bench import Bench, Records
from experiments.shared.forget_sets import Task
from experiments.shared.loop import Plan, make_plan, make_unlearn_many
from experiments.shared.methods.method import cross_entropy
from experiments.shared.models.classifier import batch_rows, calibration

SHADOW_SHARE = 0.8


def attack_by_likelihood_ratio(bench: Bench, records: Records, task: Task, progress) -> None:
    """A record ("likelihood ratio", task, method) for each method, for Original and for Retrain.

    Every shadow pair has its own random 80% of the retain set; one of the two trains on the forget
    set as well and unlearns it with the method's tuned knobs. Original skips the unlearning; Retrain is
    a second ensemble that never saw the forget set, from other seeds.
    """
    config, train = bench.config, bench.train
    names = ["Original", "Retrain", *config.methods]
    if all(("likelihood ratio", task.name, name) in records.by_key for name in names):
        return
    rng = np.random.default_rng((config.evaluation_seed, 7))
    size = int(SHADOW_SHARE * len(task.retain))
    retain = [np.sort(rng.permutation(task.retain)[:size]) for _ in range(config.shadows)]

    def trained(with_forget: bool, offset: int):
        rows = [np.union1d(part, task.forget) if with_forget else part for part in retain]
        seeds = [config.evaluation_seed + offset + number for number in range(config.shadows)]
        plans = np.stack([bench.trainer.plan(part, seed) for part, seed in zip(rows, seeds, strict=True)])
        params = bench.trainer.train_many(train, plans, jnp.stack([jax.random.key(seed) for seed in seeds]))
        progress("likelihood-ratio attack: training shadows", 1)
        return params

    @jax.jit
    def predict(params, rows):
        one = lambda inputs: bench.classifier.predict(
            inputs[0], calibration(train, inputs[1]), train.x[task.forget]
        )
        return jax.lax.map(one, (params, rows))

    def confidences(params):
        probabilities = np.asarray(predict(params, np.stack(retain)))
        if not np.all(np.isfinite(probabilities)):
            return None
        return [evaluation.logit_confidence(p, bench.data.train.y[task.forget]) for p in probabilities]

    originals, retrained = trained(True, 0), confidences(trained(False, 0))
    worlds = {"Original": lambda: originals, "Retrain": lambda: trained(False, config.shadows)}
    plans = [
        make_plan(
            task.forget,
            part,
            steps=bench.steps,
            batch_size=config.batch_size,
            seed=config.evaluation_seed + number,
        )
        for number, part in enumerate(retain)
    ]
    stacked = Plan(*(np.stack(parts) for parts in zip(*plans, strict=True)))
    keys = jax.random.split(jax.random.key(config.evaluation_seed), config.shadows)

    def unlearned(method):
        key = ("run", task.name, method, config.training_seeds[0], config.unlearning_seeds[0])
        unlearn_many = make_unlearn_many(bench.unlearner(method), config.side_by_side)
        return unlearn_many(records.by_key[key]["knobs"], originals, keys, train, bench.wrong, stacked)

    for name in names:

        def piece(name=name):
            progress(f"likelihood-ratio attack: {name}", 0)
            of_method = confidences(worlds[name]() if name in worlds else unlearned(name))
            if of_method is None:
                return {"diverged": True}
            result = evaluation.likelihood_ratio_attack(of_method, retrained)
            per_example = result.pop("per_example")
            return result | {"worst_tenth": float(np.mean(np.sort(per_example)[-len(per_example) // 10 :]))}

        records.get(("likelihood ratio", task.name, name), piece)
        progress(f"likelihood-ratio attack: {name}", name in config.methods)


def make_relearning(bench: Bench):
    """relearning(task, params) -> forget accuracies [11] along fine-tuning, compiled once for each task.

    "relearning on retain" uses retain data alone; "relearning on few" mixes in a few forget examples, half
    of every batch, and scores the others.
    """
    config, train = bench.config, bench.train
    optimizer = optax.sgd(config.relearning_rate, momentum=0.9)

    @jax.jit
    def curve(params, train, batches, scored, retain):
        loss = lambda params, rows: cross_entropy(bench.classifier.apply, params, *train[rows])

        def accuracy(params):
            probabilities = bench.classifier.predict(params, calibration(train, retain), train.x[scored])
            return 100 * jnp.mean(probabilities.argmax(-1) == train.y[scored])

        every = config.relearning_steps // 10
        return evaluation.relearning_curve(loss, accuracy, params, batches, optimizer, every)

    def relearning(task: Task, params: Any) -> dict[str, list[float]]:
        few = np.random.default_rng((config.evaluation_seed, 8)).permutation(task.forget)
        few = few[: min(config.relearning_examples, len(few) // 2)]
        seed, steps, half = config.evaluation_seed, config.relearning_steps, config.batch_size // 2
        rows = batch_rows(task.retain, config.batch_size, steps, (seed, 9))
        attacks = {"relearning on retain": (rows, task.forget)}
        if len(few):
            mixed = np.concatenate([batch_rows(few, half, steps, (seed, 10)), rows[:, half:]], 1)
            attacks["relearning on few"] = (mixed, np.setdiff1d(task.forget, few))
        return {
            name: curve(params, train, batches, scored, task.retain[:5000]).tolist()
            for name, (batches, scored) in attacks.items()
        }

    return relearning
