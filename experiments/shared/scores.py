"""What is measured of one model, and how far that is from retraining."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eupmu_jax import evaluation
from experiments.shared.forget_sets import Task
from experiments.shared.testbed import Outputs, Testbed


def accuracies(testbed: Testbed, task: Task, outputs: Outputs) -> dict[str, float]:
    """UA, RA and TA, and VA on the validation set; NaN for what is not finite."""
    train, validation, test = testbed.data
    kept_validation, kept_test = task.judged_on(validation), task.judged_on(test)
    pairs = {
        "UA": (outputs.train[task.forget], train.y[task.forget]),
        "RA": (outputs.train[task.retain], train.y[task.retain]),
        "VA": (outputs.validation[kept_validation], validation.y[kept_validation]),
        "TA": (outputs.test[kept_test], test.y[kept_test]),
    }
    if not all(np.all(np.isfinite(probabilities)) for probabilities, _ in pairs.values()):
        return dict.fromkeys(pairs, float("nan"))
    scores = {name: evaluation.accuracy(*pair) for name, pair in pairs.items()}
    return scores | {"UA": 100 - scores["UA"]}


def full_scores(
    testbed: Testbed, task: Task, outputs: Outputs, retrain: Outputs, features: Sequence[str]
) -> dict[str, Any]:
    """Everything that is reported of one model, beside what it cost; attacked by "confidence" and others."""
    train, _, test = testbed.data
    kept = task.judged_on(test)
    parts = {
        "forget": (outputs.train[task.forget], train.y[task.forget], retrain.train[task.forget]),
        "retain": (outputs.train[task.retain], train.y[task.retain], retrain.train[task.retain]),
        "test": (outputs.test[kept], test.y[kept], retrain.test[kept]),
    }
    scores = accuracies(testbed, task, outputs)
    if not np.isfinite(scores["UA"]):
        return scores | {"diverged": True}
    forget, retain, of_test = ((p, y) for p, y, _ in parts.values())
    attack = evaluation.membership_attack(forget, retain, of_test, features)
    # A softmax that is 0 in float32 rules nothing out.
    possible = lambda p: np.maximum(p, np.finfo(np.float32).tiny)
    divergences = {
        f"KL {name}": evaluation.kl_divergence(q, possible(p)) for name, (p, _, q) in parts.items()
    }
    of_class = lambda label: evaluation.accuracy(outputs.test[test.y == label], test.y[test.y == label])
    return {
        **scores,
        "MIA": attack.pop("confidence"),
        **{f"MIA {name}": value for name, value in attack.items()},
        **divergences,
        "per_class": {str(label): of_class(label) for label in np.unique(test.y)},
        "diverged": False,
    }


def against_retrain(scores: dict[str, Any], retrain: dict[str, Any]) -> dict[str, Any]:
    """The figures that compare with Retrain of the same training seed."""
    if scores["diverged"]:
        return {"gap": float("nan"), "ToW": float("nan"), "over-forgets": float("nan")}
    return {
        "gap": evaluation.average_gap(scores, retrain),
        "ToW": evaluation.tug_of_war(scores, retrain),
        "over-forgets": evaluation.is_over_forgetting(scores, retrain),
    }
