"""What TOFU judges by: truth ratio, forget quality, model utility."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from eupmu_jax.evaluation.predictions import check_log_probabilities


def truth_ratio(
    paraphrased_log_probability: ArrayLike,
    paraphrased_length: ArrayLike,
    perturbed_log_probability: ArrayLike,
    perturbed_length: ArrayLike,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
) -> np.ndarray:
    r"""How probable wrong answers are beside the right one, each per token.

    .. math:: R_j = \mathrm{mean}_i \; P(\hat a_{ji} \mid q_j)^{1 / |\hat a_{ji}|} \;/\;
        P(\tilde a_j \mid q_j)^{1 / |\tilde a_j|}

    The perturbed answers have the form of the paraphrased one and wrong facts. Range [0, inf]. It is far
    below 1 for a model that knows the answer, and near 1 for one that never learnt it. On the forget set the
    aim is Retrain's distribution, which `forget_quality` compares.

    The paper's equation takes the arithmetic mean over the perturbed answers. Its code and open-unlearning,
    from which published figures come, take the geometric one.

    Args:
      paraphrased_log_probability: log P of the right answer in other words than it was trained on, [N].
      paraphrased_length: its number of tokens, [N], >= 1.
      perturbed_log_probability: log P of several wrong answers to each question, [N, A].
      perturbed_length: their numbers of tokens, [N, A], >= 1.
      mean: "arithmetic" as in the paper's equation, or "geometric" as in its code.

    Returns:
      R, float64 [N]. NaN where a log-probability is, as after divergence.

    Raises:
      ValueError: other shapes, positive log-probabilities, lengths < 1, a mean of another name.

    Example:
      >>> import numpy as np
      >>> from eupmu_jax.evaluation import truth_ratio
      >>> right, wrong = [2 * np.log(0.5)], [[np.log(0.1), 3 * np.log(0.3)]]
      >>> truth_ratio(right, [2], wrong, [[1, 3]]).round(4).tolist()
      [0.4]

    Source: Maini et al., arXiv 2401.06121 (TOFU).
    """
    right = _per_token("paraphrased", paraphrased_log_probability, paraphrased_length, "[N]")
    wrong = _per_token("perturbed", perturbed_log_probability, perturbed_length, "[N, A]")
    if wrong.shape[:1] != right.shape:
        raise ValueError(
            f"both must have the same N, got {len(right)} paraphrased and {len(wrong)} perturbed"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        if mean == "arithmetic":
            log_mean = np.logaddexp.reduce(wrong, -1) - np.log(wrong.shape[1])
        elif mean == "geometric":
            log_mean = wrong.mean(-1)
        else:
            raise ValueError(f'mean must be "arithmetic" or "geometric", got {mean!r}')
        return np.exp(log_mean - right)


def forget_truth_ratio(truth_ratios: ArrayLike) -> float:
    r"""How near the truth ratios of a set are to 1: TOFU's score on the forget set.

    .. math:: \mathrm{mean}_j \min(R_j, 1 / R_j)

    Range [0, 1]. It is high where right and wrong answers are equally probable. The aim is Retrain's value.

    Args:
      truth_ratios: R of each question of the forget set, [N], from `truth_ratio`.

    Returns:
      The mean. It is NaN if a ratio is, as after divergence.

    Raises:
      ValueError: another shape, a negative ratio.

    Example:
      >>> from eupmu_jax.evaluation import forget_truth_ratio
      >>> forget_truth_ratio([0.5, 2.0, 1.0, 4.0])
      0.5625

    Source: the code of Maini et al., arXiv 2401.06121 (TOFU).
    """
    ratios = _check_ratios("truth_ratios", truth_ratios)
    with np.errstate(divide="ignore"):
        return float(np.mean(np.minimum(ratios, 1 / ratios)))


def utility_truth_ratio(truth_ratios: ArrayLike) -> float:
    r"""How far the truth ratios of a set are below 1: TOFU's score on what should stay.

    .. math:: \mathrm{mean}_j \max(0, 1 - R_j)

    Range [0, 1]; higher is better. It is a part of `model_utility`.

    Args:
      truth_ratios: R of each question of the retain set, of real authors or of world facts, [N], from
        `truth_ratio`.

    Returns:
      The mean. It is NaN if a ratio is, as after divergence.

    Raises:
      ValueError: another shape, a negative ratio.

    Example:
      >>> from eupmu_jax.evaluation import utility_truth_ratio
      >>> utility_truth_ratio([0.5, 2.0, 1.0, 0.25])
      0.3125

    Source: Maini et al., arXiv 2401.06121 (TOFU).
    """
    return float(np.mean(np.maximum(0, 1 - _check_ratios("truth_ratios", truth_ratios))))


def forget_quality(unlearned: ArrayLike, retrained: ArrayLike) -> float:
    r"""Whether the truth ratios of an unlearned model could be those of a retrained one: a p-value.

    .. math:: P(D \ge D_\text{observed} \mid \text{one distribution}), \quad
        D = \sup_x |F_\text{unlearned}(x) - F_\text{retrained}(x)|

    It is that of the two-sample Kolmogorov-Smirnov test, with empirical distribution functions F. Range
    [0, 1]. Higher is better: above 0.05 this test does not tell the two apart. Few questions tell little, so
    a high value on a small forget set proves nothing.

    Args:
      unlearned: truth ratios of the unlearned model on the forget set, [n], from `truth_ratio`.
      retrained: those of a model that never saw the forget set, [m], on the same questions.

    Returns:
      The p-value. It is NaN if a ratio is, as after divergence.

    Raises:
      ValueError: another shape, a negative ratio.

    Example:
      >>> from eupmu_jax.evaluation import forget_quality
      >>> round(forget_quality([0.1, 0.2, 0.3, 0.4], [0.9, 1.0, 1.1, 1.2]), 4)
      0.0286
      >>> forget_quality([0.9, 1.0, 1.1], [0.9, 1.0, 1.1])
      1.0

    Source: Maini et al., arXiv 2401.06121 (TOFU).
    """
    # JAX requires scipy; its statistics take a second to import.
    from scipy.stats import ks_2samp

    both = _check_ratios("unlearned", unlearned), _check_ratios("retrained", retrained)
    if np.isnan(both[0]).any() or np.isnan(both[1]).any():
        return float("nan")
    _, p_value = np.asarray(ks_2samp(*both))
    return float(p_value)


def model_utility(scores: Mapping[str, float]) -> float:
    r"""One number for what a model can still do: the harmonic mean of its scores.

    .. math:: K \;/\; \textstyle\sum_k 1 / s_k

    Range [0, 1]; higher is better. One score of 0 makes it 0, so that nothing may be lost altogether. TOFU
    takes nine: probability, ROUGE-L recall and `utility_truth_ratio` on the retain set, on real authors and
    on world facts.

    Args:
      scores: by name, each in [0, 1].

    Returns:
      The harmonic mean. It is NaN if a score is, as after divergence.

    Raises:
      ValueError: no score, a score outside [0, 1].

    Example:
      >>> from eupmu_jax.evaluation import model_utility
      >>> round(model_utility({"probability": 1.0, "rouge": 0.5, "truth ratio": 0.25}), 4)
      0.4286

    Source: Maini et al., arXiv 2401.06121 (TOFU).
    """
    if not scores:
        raise ValueError("scores must hold at least one")
    for name, score in scores.items():
        if score < 0 or score > 1:
            raise ValueError(f"scores must lie in [0, 1], got {score} for {name!r}")
    values = np.asarray(list(scores.values()), np.float64)
    with np.errstate(divide="ignore"):
        return float(len(values) / np.sum(1 / values))


def _per_token(which: str, log_probability: ArrayLike, length: ArrayLike, shape: str) -> np.ndarray:
    """Nats of a token, negative; ValueError for what is not of that many axes."""
    log_p = check_log_probabilities(f"{which}_log_probability", log_probability)
    lengths = np.asarray(length)
    if log_p.ndim != shape.count(",") + 1 or log_p.size == 0 or lengths.shape != log_p.shape:
        raise ValueError(
            f"{which}_log_probability and {which}_length must have one shape {shape}, none of it 0; "
            f"got {log_p.shape} and {lengths.shape}"
        )
    if not np.all(lengths >= 1):
        raise ValueError(f"{which}_length must be >= 1, got {lengths.min()}")
    return log_p / lengths


def _check_ratios(name: str, ratios: ArrayLike) -> np.ndarray:
    values = np.asarray(ratios, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must have the shape [N], N >= 1; got {values.shape}")
    if np.any(values < 0):
        raise ValueError(f"{name} must be >= 0, got {np.nanmin(values):.4g}: pass what truth_ratio returns")
    return values
