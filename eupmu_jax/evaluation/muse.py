"""What MUSE judges privacy by: the Min-K% probability of a text, and PrivLeak."""

import numpy as np
from numpy.typing import ArrayLike

from eupmu_jax.evaluation.extraction import check_counts
from eupmu_jax.evaluation.likelihood_ratio import area
from eupmu_jax.evaluation.predictions import check_log_probabilities

MembershipScores = tuple[ArrayLike, ArrayLike]
"""(of the forget set [n], of a hold-out set [m]) of one model, higher for what looks like a member."""


def min_k_log_probability(log_probabilities: ArrayLike, mask: ArrayLike, k: float = 0.4) -> np.ndarray:
    r"""Min-K% Prob: the mean log-probability of the least probable tokens of each row.

    .. math:: \mathrm{mean}_{t \in S} \log p_t, \quad S \text{ the } \max(1, \lfloor k \textstyle\sum_t m_t
        \rfloor) \text{ tokens that are least probable}

    Range [-inf, 0]. A text that was trained on has few tokens that surprise the model, so that members score
    higher. MUSE's code returns its negative.

    Args:
      log_probabilities: log p of each token, given those before it, floating [N, T].
      mask: bool [N, T], True where a token counts, at least once in each row.
      k: the share of the tokens, in (0, 1]. MUSE takes 0.4, the attack's paper mostly 0.2.

    Returns:
      float64 [N], in nats. NaN where a log-probability that counts is.

    Raises:
      TypeError: a mask that is not boolean.
      ValueError: other shapes, positive log-probabilities, a row in which nothing counts, a k outside (0, 1].

    Example:
      >>> import numpy as np
      >>> from eupmu_jax.evaluation import min_k_log_probability
      >>> log_p = [[-1.0, -4.0, -2.0, -0.5, -9.0]]
      >>> mask = np.array([[True, True, True, True, False]])
      >>> min_k_log_probability(log_p, mask, k=0.5).tolist()
      [-3.0]

    Source: Shi et al., arXiv 2310.16789; for unlearning Shi et al., arXiv 2407.06460 (MUSE).
    """
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    shape = np.shape(log_probabilities)
    if len(shape) != 2 or shape != mask.shape:
        raise ValueError(
            f"log_probabilities and mask must have one shape [N, T], got {shape} and {mask.shape}"
        )
    if not 0 < k <= 1:
        raise ValueError(f"k must be in (0, 1], the share of the tokens; got {k}")
    check_counts(mask)
    log_p = check_log_probabilities("log_probabilities", np.where(mask, log_probabilities, 0))
    amount = np.maximum(1, (k * mask.sum(-1)).astype(int))
    ordered = np.sort(np.where(mask, log_p, np.inf), -1)
    lowest = np.sum(ordered, -1, where=np.arange(shape[1]) < amount[:, None]) / amount
    # Sorting leaves NaN at the end, where it would not be seen.
    return np.where(np.isnan(log_p).any(-1), np.nan, lowest)


def priv_leak(unlearned: MembershipScores, retrained: MembershipScores) -> float:
    r"""PrivLeak: how much better or worse than Retrain an attacker finds the forget set among unseen texts.

    .. math:: 100 \, (A_\text{unlearned} - A_\text{retrained}) / A_\text{retrained}, \quad
        A = P(\text{an unseen text scores higher than a forgotten one})

    In percent, range [-100, inf], and nearer to 0 is better. Below 0 the forget set still looks like training
    data. Above 0 forgetting went so far that it marks the forget set. A is an area under the ROC curve, in
    which a tie counts half. It is MUSE's, 1 minus that in which forgotten texts are the positives: PrivLeak
    of the two differs.

    Args:
      unlearned: (forget [n], hold-out [m]) scores of the unlearned model, from `min_k_log_probability`. The
        hold-out texts are of the same kind, and neither model has seen them.
      retrained: those of a model that never saw the forget set, on the same texts.

    Returns:
      PrivLeak in percent. It is NaN if a score is, as after divergence.

    Raises:
      ValueError: scores of other shapes; a retrained model to which every forgotten text looks more like a
        member than any unseen one, for which PrivLeak is not defined.

    Example:
      >>> from eupmu_jax.evaluation import priv_leak
      >>> retrained = [-3.0, -5.0], [-4.0, -4.0]
      >>> priv_leak(([-1.0, -1.0], [-4.0, -4.0]), retrained)
      -100.0
      >>> priv_leak(([-9.0, -9.0], [-4.0, -4.0]), retrained)
      100.0

    Source: Shi et al., arXiv 2407.06460 (MUSE).
    """
    ours, theirs = _area("unlearned", unlearned), _area("retrained", retrained)
    if theirs == 0:
        raise ValueError(
            "retrained must not score every forgotten text above all unseen ones, where PrivLeak is not "
            "defined: take hold-out texts of the same kind as the forget set"
        )
    return 100 * (ours - theirs) / theirs


def _area(name: str, scores: MembershipScores) -> float:
    """P(hold-out > forget), NaN if a score is."""
    forget, hold_out = (np.asarray(part, np.float64) for part in scores)
    if forget.ndim != 1 or hold_out.ndim != 1 or not forget.size or not hold_out.size:
        raise ValueError(
            f"{name} must be (forget [n], hold-out [m]), n and m >= 1; "
            f"got {forget.shape} and {hold_out.shape}"
        )
    if np.isnan(forget).any() or np.isnan(hold_out).any():
        return float("nan")
    return area(hold_out, forget)
