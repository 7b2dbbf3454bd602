"""U-LiRA: does this output come from an unlearned model, or from a retrained one?"""

from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from eupmu_jax.evaluation.predictions import check_predictions

# float32 probabilities underflow at about this; a lower floor would turn them into outliers.
FLOOR = float(np.finfo(np.float32).tiny)

# How many observations the mean variance of all examples counts for beside an example's own.
PRIOR = 16


class _Gaussian(NamedTuple):
    """A normal distribution for each example.

    Attributes:
      mean, variance: float64 [n], in nats and squared nats.
    """

    mean: np.ndarray
    variance: np.ndarray


def logit_confidence(probabilities: ArrayLike, labels: ArrayLike) -> np.ndarray:
    r"""The log odds of the true class y, which are nearly normal over retrainings, unlike p_y.

    .. math:: \log p_y - \log \textstyle\sum_{i \ne y} p_i

    Range [-87.4, 87.4], since probabilities are floored at 1.2e-38. The sum over the other classes is not
    computed as 1 - p_y, which would round many confidences to 0. Remembered examples have high values.
    The aim is Retrain's value: neither higher nor lower is better.

    Args:
      probabilities: [n, classes], rows summing to 1.
      labels: true classes, integers [n].

    Returns:
      float64 [n], in nats.

    Raises:
      ValueError: other shapes, labels out of range, rows that are no probabilities.

    Example:
      >>> from eupmu_jax.evaluation import logit_confidence
      >>> logit_confidence([[0.5, 0.5], [0.9, 0.1]], [0, 0]).round(3).tolist()
      [0.0, 2.197]

    Source: Carlini et al., "Membership inference attacks from first principles" (arXiv 2112.03570).
    """
    p, y = check_predictions(probabilities, labels)
    is_true = np.arange(p.shape[1]) == y[:, None]
    log_sum = lambda chosen: np.log(np.maximum(np.where(chosen, p, 0).sum(-1), FLOOR))
    return log_sum(is_true) - log_sum(~is_true)


class AttackScores(TypedDict):
    """What `likelihood_ratio_attack` returns, and describes."""

    auc: float
    accuracy: float
    per_example: np.ndarray
    tpr_at_1_fpr: float


def likelihood_ratio_attack(unlearned: ArrayLike, retrained: ArrayLike) -> AttackScores:
    r"""U-LiRA: how well an attacker with shadow models tells an unlearned model from a retrained one.

    There are two ensembles of shadow models, the unlearned U and the retrained R. For every example a
    Gaussian is fitted to the logit confidences c of each ensemble. The attacker is shown the confidence of
    one more model and says "unlearned" where

    .. math::
      \log \mathcal{N}(c; \mu_U, \sigma_U^2) - \log \mathcal{N}(c; \mu_R, \sigma_R^2) > 0

    Every model is shown once. While the two models of shadow s are shown, *both* are left out of their
    ensembles. If only the shown model were left out, its own ensemble would always look farther away than
    the other. Scores of one fit therefore differ by the ensemble alone, and Retrain's mean scores are exact
    for any number of shadows, however correlated the examples are. The ROC curve is taken for each s over
    the n examples, then averaged, because scores of different fits cannot be compared.

    Few shadows say little about a variance. For an example with m fitted shadows it is

    .. math::
      \sigma^2 = \frac{(m - 1) \, v + 16 \, \bar v}{m - 1 + 16}

    with v the unbiased estimate and the bar its mean over examples. With few shadows all examples have nearly
    one variance, with many each has nearly its own; LiRA switches from the one to the other at 64. The two
    ensembles have variances of their own, since unlearning may change the spread, too.

    Higher is worse. A score above Retrain's means that traces remain, or that forgetting went beyond Retrain:
    both give the unlearned model away. An average over examples may hide a few that are not forgotten, which
    "per_example" shows.

    Args:
      unlearned: logit confidences [shadows, n], shadows >= 3, of models that trained on the n examples
        and then unlearned them; see `logit_confidence`.
      retrained: logit confidences of the same shape, of models that never saw the examples. Row s of both may
        share its seed and data. Training data should vary between shadows: with other seeds alone both
        Gaussians are too narrow.

    Returns:
      "auc": area under the ROC curve, in [0, 1]. Retrain scores 0.5.
      "accuracy": percentage of right answers, where a tie counts half. Retrain scores 50.
      "per_example": the accuracy of each example, float64 [n], in steps of 25 / shadows. Retrain's values
      have a mean of 50 and a standard deviation of roughly 50 / sqrt(shadows).
      "tpr_at_1_fpr": percentage of unlearned models that are recognised at a threshold above which at most 1%
      of the retrained lie. Retrain scores 100 (n // 100 + 1) / (n + 1), about 1 from n = 1000 on.

    Raises:
      ValueError: shapes that differ or are not [shadows >= 3, n >= 1], confidences that are not finite.

    Example:
      >>> from eupmu_jax.evaluation import likelihood_ratio_attack
      >>> result = likelihood_ratio_attack([[4.0], [5.0], [6.0]], [[0.0], [1.0], [2.0]])
      >>> result["auc"], result["accuracy"], result["per_example"].tolist()
      (1.0, 100.0, [100.0])

    Source: Hayes et al., arXiv 2403.01218 (U-LiRA), after Carlini et al., arXiv 2112.03570. Leaving out
    pairs and weighting the variance are ours.
    """
    u, r = _check_confidences(unlearned, retrained)
    of_unlearned, of_retrained = np.empty_like(u), np.empty_like(r)
    for s in range(len(u)):
        fitted = _fit(np.delete(u, s, 0)), _fit(np.delete(r, s, 0))
        of_unlearned[s], of_retrained[s] = _log_ratio(u[s], *fitted), _log_ratio(r[s], *fitted)
    # A sign of 0, a tie, is half right.
    per_example = 50 + 25 * np.mean(np.sign(of_unlearned) - np.sign(of_retrained), 0)
    shown = list(zip(of_unlearned, of_retrained, strict=True))
    return {
        "auc": float(np.mean([area(*scores) for scores in shown])),
        "accuracy": float(np.mean(per_example)),
        "per_example": per_example,
        "tpr_at_1_fpr": 100 * float(np.mean([true_positive_rate(*scores) for scores in shown])),
    }


def _check_confidences(unlearned: ArrayLike, retrained: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64; ValueError unless finite and of one shape [shadows >= 3, n >= 1]."""
    u, r = np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)
    if u.shape != r.shape:
        raise ValueError(f"unlearned and retrained must have one shape, got {u.shape} and {r.shape}")
    if u.ndim != 2 or u.shape[0] < 3 or u.shape[1] < 1:
        raise ValueError(f"confidences must have the shape [shadows >= 3, n >= 1], got {u.shape}")
    if not (np.all(np.isfinite(u)) and np.all(np.isfinite(r))):
        raise ValueError("confidences must be finite; take them from logit_confidence")
    return u, r


def _fit(confidences: np.ndarray) -> _Gaussian:
    """Mean and weighted variance of each column of [m, n]."""
    own, freedom = confidences.var(0, ddof=1), len(confidences) - 1
    variance = (freedom * own + PRIOR * own.mean()) / (freedom + PRIOR)
    # Shadows may agree to the last bit, but no confidence is known to 1e-6 nats.
    return _Gaussian(confidences.mean(0), np.maximum(variance, 1e-12))


def _log_ratio(confidence: np.ndarray, unlearned: _Gaussian, retrained: _Gaussian) -> np.ndarray:
    """log N(c; unlearned) - log N(c; retrained) of each example, [n]."""
    surprise = lambda fitted: np.log(fitted.variance) + (confidence - fitted.mean) ** 2 / fitted.variance
    return (surprise(retrained) - surprise(unlearned)) / 2


def area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve: P(positive > negative) + P(positive = negative) / 2."""
    ordered = np.sort(negatives)
    below, not_above = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
    return float(np.mean(below + not_above)) / (2 * len(negatives))


def true_positive_rate(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Share of the positives above a threshold that at most 1% of the negatives exceed."""
    threshold = np.sort(negatives)[::-1][len(negatives) // 100]
    return float(np.mean(positives > threshold))
