"""U-LiRA: which world does this output come from, unlearned or never trained on?"""

from typing import Any, NamedTuple

import numpy as np

from eupmu_jax.evaluation.predictions import check_predictions

# float32 probabilities underflow at about this; a lower floor would turn them into outliers.
FLOOR = float(np.finfo(np.float32).tiny)

# How many observations the mean variance of all examples counts for beside an example's own.
PRIOR = 16


class Gaussian(NamedTuple):
    """One normal distribution per example, each field [n]."""

    mean: np.ndarray
    variance: np.ndarray


def logit_confidence(probabilities: Any, labels: Any) -> np.ndarray:
    r"""Log odds of the true class y: near to normally distributed over retrainings, as p_y is not.

    .. math:: \log p_y - \log \textstyle\sum_{i \ne y} p_i

    Range [-87.4, 87.4], probabilities being floored at 1.2e-38; the sum over the other classes keeps
    apart the confidences that 1 - p_y would round to 0. High where the example is remembered; of two
    models neither is better by it, only nearer to Retrain.

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


def likelihood_ratio_attack(unlearned: Any, retrained: Any) -> dict[str, Any]:
    r"""U-LiRA: how well an attacker with shadow models tells an unlearned model from a retrained one.

    For every example x a Gaussian is fitted to the logit confidences c of each ensemble. Shown one
    more model's confidence, the attacker says "unlearned" where

    .. math::
      \log \mathcal{N}(c; \mu_U, \sigma_U^2) - \log \mathcal{N}(c; \mu_R, \sigma_R^2) > 0

    Every model is shown once. Shadow s is left out of *both* ensembles while the two models s are
    shown: were only the shown one left out, its own world would always look farther away than the
    other. So the models s differ by their worlds alone, and Retrain's scores are exact in the mean
    for any number of shadows, however correlated examples are. That holds among the scores of one
    fit: the ROC curve is taken per s, over the n examples, and averaged.

    Few shadows say little about a variance. That of an example with m fitted shadows is

    .. math::
      \sigma^2 = \frac{(m - 1) \, v + 16 \, \bar v}{m - 1 + 16}

    with v the unbiased estimate and the bar its mean over examples: nearly one variance for all,
    as LiRA has it below 64 shadows, and nearly the example's own from there on. Each ensemble has
    its own, since unlearning may change spread as well as confidence.

    Higher is worse. Above what Retrain scores, traces remain or forgetting went beyond Retrain: both
    make the unlearned world recognisable. As an average over examples it may hide a few that are not
    forgotten; see "per_example".

    Args:
      unlearned: logit confidences [shadows, n], shadows >= 3, of models that trained on the n examples
        and then unlearned them; see `logit_confidence`.
      retrained: the same shape, of models that never saw the examples. Shadows may be paired by seed
        and data, row by row. Training data should vary between shadows: seeds alone make both
        worlds too narrow.

    Returns:
      "auc": area under the ROC curve in [0, 1]; Retrain scores 0.5.
      "accuracy": percent of answers that are right, ties counting half; Retrain scores 50.
      "per_example": the same for each example, float64 [n], in steps of 25 / shadows. Retrain's
      spread around 50 with a standard deviation of roughly 50 / sqrt(shadows).
      "tpr_at_1_fpr": percent of the unlearned recognised where at most 1% of the retrained are
      mistaken for them; Retrain scores 100 (n // 100 + 1) / (n + 1), about 1 from n = 1000 on.

    Raises:
      ValueError: shapes that differ or are not [shadows >= 3, n >= 1], confidences that are not finite.

    Example:
      >>> from eupmu_jax.evaluation import likelihood_ratio_attack
      >>> result = likelihood_ratio_attack([[4.0], [5.0], [6.0]], [[0.0], [1.0], [2.0]])
      >>> result["auc"], result["accuracy"], result["per_example"].tolist()
      (1.0, 100.0, [100.0])

    Source: Hayes et al., arXiv 2403.01218 (U-LiRA), after Carlini et al., arXiv 2112.03570; leaving
    out pairs and the weighted variance are ours.
    """
    u, r = check_confidences(unlearned, retrained)
    of_unlearned, of_retrained = np.empty_like(u), np.empty_like(r)
    for s in range(len(u)):
        worlds = fit(np.delete(u, s, 0)), fit(np.delete(r, s, 0))
        of_unlearned[s], of_retrained[s] = log_ratio(u[s], *worlds), log_ratio(r[s], *worlds)
    # A sign of 0, a tie, is half right.
    per_example = 50 + 25 * np.mean(np.sign(of_unlearned) - np.sign(of_retrained), 0)
    shown = list(zip(of_unlearned, of_retrained, strict=True))
    return {
        "auc": float(np.mean([area(*scores) for scores in shown])),
        "accuracy": float(np.mean(per_example)),
        "per_example": per_example,
        "tpr_at_1_fpr": 100 * float(np.mean([true_positive_rate(*scores) for scores in shown])),
    }


def check_confidences(unlearned: Any, retrained: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64; ValueError unless finite and of one shape [shadows >= 3, n >= 1]."""
    u, r = np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)
    if u.shape != r.shape:
        raise ValueError(f"unlearned and retrained must have one shape, got {u.shape} and {r.shape}")
    if u.ndim != 2 or u.shape[0] < 3 or u.shape[1] < 1:
        raise ValueError(f"confidences must have the shape [shadows >= 3, n >= 1], got {u.shape}")
    if not (np.all(np.isfinite(u)) and np.all(np.isfinite(r))):
        raise ValueError("confidences must be finite; take them from logit_confidence")
    return u, r


def fit(confidences: np.ndarray) -> Gaussian:
    """Mean and weighted variance of each column of [m, n]."""
    own, freedom = confidences.var(0, ddof=1), len(confidences) - 1
    variance = (freedom * own + PRIOR * own.mean()) / (freedom + PRIOR)
    # Shadows that agree to the last bit; no confidence is known to 1e-6 nats.
    return Gaussian(confidences.mean(0), np.maximum(variance, 1e-12))


def log_ratio(confidence: np.ndarray, unlearned: Gaussian, retrained: Gaussian) -> np.ndarray:
    """log N(c; unlearned) - log N(c; retrained) of each example, [n]."""
    surprise = lambda world: np.log(world.variance) + (confidence - world.mean) ** 2 / world.variance
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
