"""What greedy decoding gives back of a text: exact memorisation, verbatim prefix, extraction strength.

One teacher-forced forward pass is enough. Greedy decoding follows a row for as long as every token is the
most probable one after those before it.
"""

import numpy as np
from numpy.typing import ArrayLike


def exact_memorisation(hits: ArrayLike, mask: ArrayLike) -> np.ndarray:
    r"""The share of the tokens of each row that are the most probable ones after those before them.

    .. math:: \textstyle\sum_t m_t \, [\arg\max_v p_t(v) = y_t] \;/\; \sum_t m_t

    Range [0, 1]. Lower is better on the forget set, where the aim is Retrain's value.

    Args:
      hits: bool [N, T], True where the token is the most probable one after the *true* tokens before it.
      mask: bool [N, T], True where a token counts (the answer, not the prompt), at least once in each row.

    Returns:
      float64 [N].

    Raises:
      TypeError: hits or a mask that are not boolean.
      ValueError: other shapes; a row in which nothing counts.

    Example:
      >>> import numpy as np
      >>> from eupmu_jax.evaluation import exact_memorisation
      >>> hits = np.array([[False, True, True, False], [True, True, True, True]])
      >>> mask = np.array([[False, True, True, True], [True, True, False, False]])
      >>> exact_memorisation(hits, mask).round(3).tolist()
      [0.667, 1.0]

    Source: Tirumala et al., arXiv 2205.10770; for unlearning Dorna et al., arXiv 2506.12618
    (open-unlearning).
    """
    hits, mask = _check(hits, mask)
    return np.sum(hits, -1, where=mask) / mask.sum(-1)


def verbatim_prefix(hits: ArrayLike, mask: ArrayLike) -> np.ndarray:
    r"""The share of each row that greedy decoding gives before its first error.

    .. math:: \max \{ k : \arg\max_v p_t(v) = y_t \text{ for the first } k \text{ tokens that count} \} \;/\;
        \textstyle\sum_t m_t

    Range [0, 1], 1 for a row that is given verbatim. Lower is better on the forget set, where the aim is
    Retrain's value.

    Args:
      hits, mask: as for `exact_memorisation`.

    Returns:
      float64 [N].

    Raises:
      TypeError, ValueError: as for `exact_memorisation`.

    Example:
      >>> import numpy as np
      >>> from eupmu_jax.evaluation import verbatim_prefix
      >>> hits = np.array([[True, False, True, True], [True, True, True, True]])
      >>> verbatim_prefix(hits, np.ones_like(hits)).tolist()
      [0.25, 1.0]

    Source: Carlini et al., arXiv 2202.07646, for what counts as extractable.
    """
    hits, mask = _check(hits, mask)
    return _run(hits, mask) / mask.sum(-1)


def extraction_strength(hits: ArrayLike, mask: ArrayLike) -> np.ndarray:
    r"""The share of each row that follows from what stands before it: its longest end without an error.

    .. math:: 1 - \min \{ k : \arg\max_v p_t(v) = y_t \text{ for all but the first } k
        \text{ tokens that count} \} \;/\; \textstyle\sum_t m_t

    Range [0, 1]: 1 for a row that is given verbatim, 0 for one whose last token is wrong. Lower is better on
    the forget set, where the aim is Retrain's value. open-unlearning computes the same, but for a row whose
    last token is wrong, to which it gives one token's share.

    Args:
      hits, mask: as for `exact_memorisation`.

    Returns:
      float64 [N].

    Raises:
      TypeError, ValueError: as for `exact_memorisation`.

    Example:
      >>> import numpy as np
      >>> from eupmu_jax.evaluation import extraction_strength
      >>> hits = np.array([[True, False, True, True], [True, True, True, False]])
      >>> extraction_strength(hits, np.ones_like(hits)).tolist()
      [0.5, 0.0]

    Source: Carlini et al., arXiv 2012.07805; for unlearning Dorna et al., arXiv 2506.12618
    (open-unlearning).
    """
    hits, mask = _check(hits, mask)
    return _run(hits[:, ::-1], mask[:, ::-1]) / mask.sum(-1)


def _run(hits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """How many of the tokens that count come before the first one that is no hit, [N]."""
    is_right = np.logical_and.accumulate(hits | ~mask, -1)
    return np.sum(is_right & mask, -1)


def _check(hits: ArrayLike, mask: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    hits, mask = np.asarray(hits), np.asarray(mask)
    for name, value in ("hits", hits), ("mask", mask):
        if value.dtype != bool:
            raise TypeError(f"{name} must be boolean, got {value.dtype}")
    if hits.ndim != 2 or hits.shape != mask.shape:
        raise ValueError(f"hits and mask must have one shape [N, T], got {hits.shape} and {mask.shape}")
    check_counts(mask)
    return hits, mask


def check_counts(mask: np.ndarray) -> None:
    """ValueError if nothing counts in a row of [N, T]."""
    if not mask.any(-1).all():
        row = int(np.argmin(mask.any(-1)))
        raise ValueError(
            f"mask must be True somewhere in each row, which it is not in row {row}: leave it out"
        )
