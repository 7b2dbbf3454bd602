"""Predictions as every metric takes them, checked and in float64."""

import numpy as np
from numpy.typing import ArrayLike

Predictions = tuple[ArrayLike, ArrayLike]
"""(probabilities [n, classes], labels [n]) of one model on one set of examples."""


def check_probabilities(probabilities: ArrayLike) -> np.ndarray:
    """[n, classes] in float64, n >= 1; ValueError if its rows are no probabilities."""
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or p.size == 0:
        raise ValueError(f"probabilities must have the shape [n, classes], n >= 1; got {p.shape}")
    # Rows computed in bfloat16 sum to 1 within a hundredth.
    if not (np.all(p >= 0) and np.all(np.abs(p.sum(-1) - 1) < 1e-2)):
        raise ValueError("probabilities must be >= 0 with rows that sum to 1 (apply softmax to logits)")
    return p


def check_predictions(probabilities: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and their labels as integers [n]."""
    p, y = check_probabilities(probabilities), np.asarray(labels)
    if y.shape != p.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels must be integers of shape [{len(p)}], got {y.dtype} {y.shape}")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels must lie in [0, {p.shape[1]}), got {y.min()} to {y.max()}")
    return p, y


def check_log_probabilities(name: str, log_probabilities: ArrayLike) -> np.ndarray:
    """In float64, NaN included; ValueError if one is positive, as losses are."""
    log_p = np.asarray(log_probabilities, np.float64)
    # What is certain may round to a little more than 0.
    if np.any(log_p > 1e-3):
        raise ValueError(
            f"{name} must be <= 0, got {np.nanmax(log_p):.4g}: pass log-probabilities, not losses"
        )
    return log_p
