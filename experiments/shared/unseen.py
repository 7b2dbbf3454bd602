"""How confident of their labels a model would be that had never seen the examples to forget."""

import numpy as np

from eupmu_jax import evaluation, objectives
from experiments.shared.data.images import Data, Examples
from experiments.shared.forget_sets import Task

BINS = 25
EXAMPLES_IN_A_BIN = 4

Predictions = tuple[np.ndarray, np.ndarray]
"""Probabilities [n, classes] of one model for the training set, and for the validation set."""


def unseen_targets(task: Task, data: Data, original: Predictions, reference: Predictions) -> np.ndarray:
    r"""The targets of `objectives.confidence_target`, NaN [n] for all but the forget examples.

    .. math:: t_i = \phi_i + Q_{\{c_j - \phi_j\}}(u_i)

    c is the confidence under the original model, phi that under a reference which saw neither the forget
    set nor the validation set; j are validation examples whose phi is near. What is carried over is how much
    *more* confident the original is of an unseen example than the reference: so the targets go on falling
    with phi below that of the hardest validation example.

    Left out are validation examples that are nearer to a forget example than to any other of their class:
    the original was trained on their like, which Retrain never saw. Of a forgotten class that leaves none,
    and the targets are phi itself.
    """
    (c, c_held_out), (phi, phi_held_out) = (confidences(data, *of) for of in (original, reference))
    c, phi = c[task.forget], phi[task.forget]
    targets = np.full(data.train.size, np.nan)
    targets[task.forget] = phi
    if task.whole_class is None:
        rows = like_retained(task, data.train, data.validation)
        c_held_out, phi_held_out = c_held_out[rows], phi_held_out[rows]
        bins = max(1, min(BINS, min(len(phi), len(rows)) // EXAMPLES_IN_A_BIN))
        targets[task.forget] += objectives.unseen_confidence(
            c - phi, phi, c_held_out - phi_held_out, phi_held_out, bins
        )
    return targets


def confidences(data: Data, train: np.ndarray, validation: np.ndarray) -> Predictions:
    """In the true labels, [n] of each set."""
    pairs = ((train, data.train), (validation, data.validation))
    of_train, of_validation = (evaluation.logit_confidence(p, examples.y) for p, examples in pairs)
    return of_train, of_validation


def like_retained(task: Task, train: Examples, held_out: Examples) -> np.ndarray:
    """Row numbers of the held-out examples whose nearest neighbour of their class is retained."""
    nearest = np.full(held_out.size, -1)
    flat = lambda examples: examples.x.reshape(len(examples.x), -1).astype(np.float64)
    seen = np.concatenate([task.forget, task.retain])
    for label in np.unique(held_out.y):
        candidates, rows = seen[train.y[seen] == label], np.flatnonzero(held_out.y == label)
        if len(candidates):
            a, b = flat(held_out[rows]), flat(train[candidates])
            # Squared distances but for |a|^2, which is the same for all candidates.
            nearest[rows] = candidates[(np.sum(b**2, 1) - 2 * a @ b.T).argmin(1)]
    return np.flatnonzero(np.isin(nearest, task.retain))
