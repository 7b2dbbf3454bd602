"""ROUGE-L: how much of an answer a generated text gives, word by word and in order."""

import re
from typing import NamedTuple


class RougeL(NamedTuple):
    """What `rouge_l` returns, each in [0, 1].

    Attributes:
      recall: the share of the reference's words that are given.
      f1: the harmonic mean of that and of the share of given words that are the reference's.
    """

    recall: float
    f1: float


def rouge_l(reference: str, candidate: str) -> RougeL:
    r"""ROUGE-L: the longest common subsequence of words of two texts, beside their lengths.

    .. math:: R = L / |r|, \quad P = L / |c|, \quad F_1 = 2 P R / (P + R) = 2 L / (|r| + |c|)

    Range [0, 1]. Higher is better for what should stay. On the forget set the aim is Retrain's value. Words
    are runs of a-z and 0-9 in lower case, as in the `rouge_score` package without its stemmer. MUSE's code
    does the same. TOFU's code stems the words first, and its figures are a little higher.

    Args:
      reference: the true answer.
      candidate: the model's.

    Returns:
      (recall, f1), as a `NamedTuple`. Both are 0 if either text has no word.

    Example:
      >>> from eupmu_jax.evaluation import rouge_l
      >>> score = rouge_l("He was born in Tarrow Bay.", "Born in Tarrow, I think")
      >>> score.recall, round(score.f1, 3)
      (0.5, 0.545)

    Source: Lin, "ROUGE: A package for automatic evaluation of summaries" (2004); in unlearning Maini et al.,
    arXiv 2401.06121 (TOFU) for the recall, Shi et al., arXiv 2407.06460 (MUSE) for F1.
    """
    expected, given = _words(reference), _words(candidate)
    if not expected or not given:
        return RougeL(0.0, 0.0)
    common = _common_subsequence(expected, given)
    return RougeL(common / len(expected), 2 * common / (len(expected) + len(given)))


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """The length of the longest one."""
    # longest[j] is that of the words of the first text so far and the first j of the second.
    longest = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            above = longest[j]
            longest[j] = diagonal + 1 if word == other else max(above, longest[j - 1])
            diagonal = above
    return longest[-1]
