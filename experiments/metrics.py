"""What an unlearned classifier is judged by; each is nearer to Retrain's value the better."""

import numpy as np
from sklearn.svm import SVC

from experiments.data import Split


def evaluate(predict, split: Split) -> dict[str, float]:
    """UA, RA, TA and MIA in percent, from predict: inputs [n, features] -> probabilities [n, classes].

    UA = 100 - accuracy on the forget set, RA and TA the accuracies on the retain and test sets, MIA
    the share of forget examples that a membership attack takes for non-members. All NaN for a
    network that has diverged.
    """
    forget, retain, test = ((np.asarray(predict(examples.x)), examples.y) for examples in split)
    if not all(np.all(np.isfinite(probabilities)) for probabilities, _ in (forget, retain, test)):
        return dict.fromkeys(("UA", "RA", "TA", "MIA"), float("nan"))
    accuracy = lambda probabilities, y: 100 * float(np.mean(probabilities.argmax(-1) == y))
    return {
        "UA": 100 - accuracy(*forget),
        "RA": accuracy(*retain),
        "TA": accuracy(*test),
        "MIA": membership_attack(*(confidence(*part) for part in (forget, retain, test))),
    }


def confidence(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probability of the true class, [n]."""
    return probabilities[np.arange(len(labels)), labels]


def membership_attack(forget: np.ndarray, members: np.ndarray, others: np.ndarray) -> float:
    """Percent of `forget` that an RBF-SVC fitted on members against others takes for others."""
    size = min(len(members), len(others))
    seen = np.concatenate([members[:size], others[:size]])[:, None]
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(seen, np.repeat([1, 0], size))
    return 100 * float(np.mean(attack.predict(forget[:, None]) == 0))


def average_gap(scores: dict[str, float], retrain: dict[str, float]) -> float:
    """Mean absolute difference to Retrain over UA, RA, TA and MIA, in points."""
    return float(np.mean([abs(scores[name] - retrain[name]) for name in ("UA", "RA", "TA", "MIA")]))
