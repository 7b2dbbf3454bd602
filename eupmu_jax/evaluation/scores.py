"""Accuracies of the classification protocol, and distances to the retrained model."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from eupmu_jax.evaluation.membership import membership_attack
from eupmu_jax.evaluation.predictions import Predictions, check_predictions, check_probabilities


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""The percentage of examples whose most probable class is the true one.

    .. math:: 100 \cdot \mathrm{mean}_j [\arg\max_i p_{ji} = y_j]

    Range [0, 100]. Higher is better on retain and test sets. On the forget set the aim is Retrain's value.

    Args:
      probabilities: [n, classes], rows summing to 1.
      labels: true classes, integers [n].

    Returns:
      A percentage.

    Raises:
      ValueError: other shapes, labels out of range, rows that are no probabilities.

    Example:
      >>> from eupmu_jax.evaluation import accuracy
      >>> accuracy([[0.9, 0.1], [0.8, 0.2]], [0, 1])
      50.0
    """
    p, y = check_predictions(probabilities, labels)
    return 100 * float(np.mean(p.argmax(-1) == y))


def classification_scores(forget: Predictions, retain: Predictions, test: Predictions) -> dict[str, float]:
    """The protocol's four figures of one model, in percent; nearer to Retrain's is better.

    UA is 100 - accuracy on the forget set. RA and TA are the accuracies on the retain and test sets. MIA is
    the share of the forget set that `membership_attack` takes for non-members by confidence. All are in
    [0, 100]. To forget a whole class, leave that class out of the test set.

    Args:
      forget, retain, test: (probabilities [n, classes], labels [n]) of the model.

    Returns:
      The scores by name, "UA", "RA", "TA" and "MIA". All are NaN if a prediction is not finite, as after
      divergence.

    Raises:
      ImportError: scikit-learn is missing.
      ValueError: as for `accuracy`.

    Example:
      >>> import numpy as np
      >>> from eupmu_jax.evaluation import classification_scores
      >>> sure, labels = np.tile([0.99, 0.01], (20, 1)), np.zeros(20, int)
      >>> scores = classification_scores((sure, labels), (sure, labels), (sure, labels))
      >>> scores["UA"], scores["RA"], scores["TA"]
      (0.0, 100.0, 100.0)

    Source: SalUn (arXiv 2310.12508) and the EUPMU repository.
    """
    if not all(np.all(np.isfinite(np.asarray(p, np.float64))) for p, _ in (forget, retain, test)):
        return dict.fromkeys(("UA", "RA", "TA", "MIA"), float("nan"))
    return {
        "UA": 100 - accuracy(*forget),
        "RA": accuracy(*retain),
        "TA": accuracy(*test),
        "MIA": membership_attack(forget, retain, test, ("confidence",))["confidence"],
    }


def average_gap(
    scores: Mapping[str, float],
    retrain: Mapping[str, float],
    names: Sequence[str] = ("UA", "RA", "TA", "MIA"),
) -> float:
    r"""The mean absolute difference to Retrain over the named scores, in points.

    .. math:: \mathrm{mean}_s |a_s - a_s^{\text{Retrain}}|

    Range [0, 100]; lower is better, Retrain scores 0.

    Args:
      scores, retrain: percentages by name, as from `classification_scores`.
      names: which of them to average over.

    Returns:
      The gap in points.

    Raises:
      KeyError: a name that is missing.

    Example:
      >>> from eupmu_jax.evaluation import average_gap
      >>> average_gap({"RA": 90.0, "TA": 80.0}, {"RA": 100.0, "TA": 84.0}, ("RA", "TA"))
      7.0

    Source: SalUn (arXiv 2310.12508).
    """
    return float(np.mean([abs(scores[name] - retrain[name]) for name in names]))


def tug_of_war(scores: Mapping[str, float], retrain: Mapping[str, float]) -> float:
    r"""The ToW (tug of war) score: how near a model is to Retrain on all three sets at once.

    .. math:: \prod_{s \in \{UA, RA, TA\}} (1 - |a_s - a_s^{\text{Retrain}}| / 100)

    Range [0, 1]; higher is better, Retrain scores 1.

    Args:
      scores, retrain: percentages by name, as from `classification_scores`.

    Returns:
      The product.

    Raises:
      KeyError: a name that is missing.

    Example:
      >>> from eupmu_jax.evaluation import tug_of_war
      >>> tug_of_war({"UA": 50, "RA": 100, "TA": 90}, {"UA": 0, "RA": 100, "TA": 90})
      0.5

    Source: Zhao et al., arXiv 2406.01257.
    """
    return float(np.prod([1 - abs(scores[name] - retrain[name]) / 100 for name in ("UA", "RA", "TA")]))


def is_over_forgetting(
    scores: Mapping[str, float], retrain: Mapping[str, float], margin: float = 5.0
) -> bool:
    r"""Whether forgetting went so far beyond Retrain that it marks the forget set.

    .. math:: \exists \, s \in \{UA, MIA\}: \quad a_s - a_s^{\text{Retrain}} > \text{margin}

    A model that errs on the forget set more than one that never saw it tells an attacker which examples were
    deleted (the Streisand effect). False is better, and Retrain scores False. A model that has forgotten too
    little scores False as well: read this beside `average_gap`, not in its place.

    Args:
      scores, retrain: percentages by name, as from `classification_scores`.
      margin: points above Retrain that count as noise. Take more than the spread of Retrain over its seeds.

    Returns:
      True or False.

    Raises:
      KeyError: a name that is missing.
      ValueError: a score that is NaN, as after divergence.

    Example:
      >>> from eupmu_jax.evaluation import is_over_forgetting
      >>> retrain = {"UA": 5.0, "MIA": 12.0}
      >>> is_over_forgetting({"UA": 7.0, "MIA": 37.0}, retrain)
      True
      >>> is_over_forgetting({"UA": 3.0, "MIA": 14.0}, retrain)
      False

    Source: Golatkar et al., arXiv 1911.04933, for the effect.
    """
    beyond = {name: scores[name] - retrain[name] for name in ("UA", "MIA")}
    for name, points in beyond.items():
        if np.isnan(points):
            raise ValueError(f"{name} must not be NaN, got {scores[name]} and Retrain's {retrain[name]}")
    return any(points > margin for points in beyond.values())


def kl_divergence(reference: ArrayLike, probabilities: ArrayLike) -> float:
    r"""The mean Kullback-Leibler divergence of a model's predictions from a reference's, in nats.

    .. math:: \mathrm{mean}_j \textstyle\sum_i q_{ji} \log (q_{ji} / p_{ji}), \quad q \text{ the reference}

    Range [0, inf], and lower is better. Retrain as its own reference scores 0, and a second retraining a
    little more. It is infinite where the model rules out what the reference allows.

    Args:
      reference: q, the probabilities [n, classes] of Retrain on the same examples.
      probabilities: p, those of the model, [n, classes].

    Returns:
      The mean divergence in nats.

    Raises:
      ValueError: shapes that differ, rows that are no probabilities.

    Example:
      >>> from eupmu_jax.evaluation import kl_divergence
      >>> round(kl_divergence([[1.0, 0.0]], [[0.5, 0.5]]), 4)
      0.6931
    """
    q, p = check_probabilities(reference), check_probabilities(probabilities)
    if q.shape != p.shape:
        raise ValueError(f"reference and probabilities must have one shape, got {q.shape} and {p.shape}")
    with np.errstate(divide="ignore"):
        ratio = np.log(np.where(q > 0, q, 1)) - np.log(np.where(q > 0, p, 1))
    return float(np.mean(np.sum(np.where(q > 0, q * ratio, 0), -1)))
