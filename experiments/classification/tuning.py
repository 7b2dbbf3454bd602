"""Which settings are tried, and which of them is taken, without looking at Retrain."""

import numpy as np
from scipy.stats import qmc

from experiments.shared.peers import Peer

FULLY_FORGOTTEN = 99.5


def settings_to_try(peer: Peer, trials: int, seed: int) -> list[dict[str, float]]:
    """Points of a scrambled Sobol sequence in the logarithms of the learning rate and the knobs."""
    ranges = {"learning_rate": peer.learning_rate, **peer.knobs}
    # Balanced for powers of two only; drawing as many and dropping the rest keeps scipy content.
    sample = qmc.Sobol(len(ranges), rng=seed).random_base2((trials - 1).bit_length())[:trials]
    low, high = np.log(np.array(list(ranges.values()))).T
    return [dict(zip(ranges, map(float, row), strict=True)) for row in np.exp(low + sample * (high - low))]


def blind_score(scores: dict[str, float], original: dict[str, float], whole_class: bool) -> float:
    """How bad a trial is, judged without Retrain and without the test set; lower is better.

    Forgetting a class: full forgetting at the highest utility. Else |dRA| + |dVA| against the
    original, plus |forget accuracy - the original's validation accuracy|: what was forgotten should
    be as hard as what was never seen.

    Source: the EUPMU repository's rule, with validation in place of test accuracy.
    """
    if not all(map(np.isfinite, scores.values())):
        return float("inf")
    if whole_class:
        missing = max(0.0, FULLY_FORGOTTEN - scores["UA"])
        return 200 - scores["RA"] - scores["VA"] + 1000 * (missing > 0) + missing
    distance = abs(scores["RA"] - original["RA"]) + abs(scores["VA"] - original["VA"])
    return distance + abs(100 - scores["UA"] - original["VA"])
