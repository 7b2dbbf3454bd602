"""How near the targets of the unseen confidence are to what they stand for: the confidence of Retrain."""

import numpy as np
from scipy.stats import wasserstein_distance

from eupmu_jax import evaluation
from experiments.shared.comparison import Comparison
from experiments.shared.records import Record


def measure_targets(on_task: Comparison) -> None:
    """A record ("targets", task, seed) for each original, if a method has such targets."""
    testbed, task = on_task.testbed, on_task.task
    methods = [name for name in testbed.config.methods if has_targets(on_task, name)]
    labels = testbed.data.train.y[task.forget]

    def piece(seed: int) -> Record:
        outputs = {
            "original": testbed.predict(on_task.originals[seed].params, task.retain),
            "retrain": on_task.retrained_outputs[seed],
        }
        c = {name: evaluation.logit_confidence(of.train[task.forget], labels) for name, of in outputs.items()}
        c["targets"] = np.asarray(on_task.told(methods[0], seed).fields["unseen"])[task.forget]
        below = {f"doubted {name}": 100 * float(np.mean(values < 0)) for name, values in c.items()}
        from_retrain = lambda name: float(wasserstein_distance(c[name], c["retrain"]))
        return below | {f"nats {name}": from_retrain(name) for name in ("original", "targets")}

    for seed in testbed.config.training_seeds if methods else ():
        on_task.records.get(("targets", task.name, seed), lambda seed=seed: piece(seed))


def has_targets(on_task: Comparison, method: str) -> bool:
    return on_task.testbed.peers[method].forget_loss == "unseen confidence"
