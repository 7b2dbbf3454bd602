"""The membership attack of the classification protocol: was this example trained on?"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from eupmu_jax.evaluation.predictions import Predictions, check_predictions


def membership_features(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, np.ndarray]:
    r"""What an attacker may look at in a prediction p of an example with true class y.

    .. math::
      \text{correctness} &= [\arg\max_i p_i = y] \qquad \text{confidence} = p_y \\
      \text{entropy} &= -\textstyle\sum_i p_i \log p_i \\
      \text{modified\_entropy} &= -(1 - p_y) \log p_y - \textstyle\sum_{i \ne y} p_i \log (1 - p_i) \\
      \text{probability} &= p

    Members tend to have a high correctness and confidence, and low entropies.

    Args:
      probabilities: [n, classes], rows summing to 1.
      labels: true classes, integers [n].

    Returns:
      float64 arrays [n, 1] by name; "probability" is [n, classes]. Entropies are in nats and >= 0.

    Raises:
      ValueError: other shapes, labels out of range, rows that are no probabilities.

    Example:
      >>> from eupmu_jax.evaluation import membership_features
      >>> features = membership_features([[0.5, 0.5], [1.0, 0.0]], [0, 1])
      >>> features["entropy"].round(3).tolist()
      [[0.693], [0.0]]

    Source: Song and Mittal, "Systematic evaluation of privacy risks of machine learning models"
    (USENIX Security 2021), for the modified entropy.
    """
    p, y = check_predictions(probabilities, labels)
    true = p[np.arange(len(y)), y]
    tiny = np.finfo(np.float64).tiny
    log = lambda x: np.log(np.maximum(x, tiny))
    others = p * log(1 - p)
    others[np.arange(len(y)), y] = 0
    return {
        "correctness": (p.argmax(-1) == y).astype(np.float64)[:, None],
        "confidence": true[:, None],
        "entropy": np.abs(np.sum(p * log(p), -1))[:, None],
        "modified_entropy": (-(1 - true) * log(true) - others.sum(-1))[:, None],
        "probability": p,
    }


FEATURES = ("correctness", "confidence", "entropy", "modified_entropy", "probability")


def membership_attack(
    forget: Predictions,
    members: Predictions,
    non_members: Predictions,
    features: Sequence[str] = FEATURES,
) -> dict[str, float]:
    """The percentage of the forget set that an attacker takes for non-members, by each feature.

    An RBF support vector classifier (C = 3, gamma = 1 / number of features) is fitted on the unlearned
    model's predictions of equally many members (the retain set) and non-members (the test set). It then
    classifies the forget set. Range [0, 100]. The aim is Retrain's value, not 100: forgetting beyond it marks
    the forget set as clearly as remembering does. By "confidence" this is the MIA of the classification
    protocol.

    Args:
      forget, members, non_members: (probabilities [n, classes], labels [n]) of the unlearned model.
        The first examples are used where there are more members than non-members or the reverse.
      features: names from `membership_features`. Each gets a classifier of its own, whose time grows with the
        square of the number of examples.

    Returns:
      A percentage for each of the features, and "auc" in [0, 1]: the area under the ROC curve of telling
      forget examples from non-members by confidence. Retrain scores 0.5 where both come from one
      distribution. Above that the forget set still looks like training data.

    Raises:
      ImportError: scikit-learn is missing.
      ValueError: an empty set, a feature of another name, and what `membership_features` raises.

    Example:
      >>> import numpy as np
      >>> from eupmu_jax.evaluation import membership_attack
      >>> sure, unsure = np.tile([0.99, 0.01], (20, 1)), np.tile([0.6, 0.4], (20, 1))
      >>> labels = np.zeros(20, int)
      >>> membership_attack((sure, labels), (sure, labels), (unsure, labels))["confidence"]
      0.0

    Source: the SVC attack of SalUn (arXiv 2310.12508) and the EUPMU repository.
    """
    try:
        from sklearn.metrics import roc_auc_score
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            'the membership attack needs scikit-learn: pip install "eupmu_jax[evaluation]"'
        ) from error
    if unknown := set(features) - set(FEATURES):
        raise ValueError(f"features must be among {', '.join(FEATURES)}; got {', '.join(sorted(unknown))}")
    targets, inside, outside = (membership_features(*part) for part in (forget, members, non_members))
    size = min(len(inside["confidence"]), len(outside["confidence"]))
    is_member = np.repeat([1, 0], size)
    result = {}
    for name in features:
        seen = np.concatenate([inside[name][:size], outside[name][:size]])
        attack = SVC(C=3, gamma="auto", kernel="rbf").fit(seen, is_member)
        result[name] = 100 * float(np.mean(attack.predict(targets[name]) == 0))
    confidences = np.concatenate([targets["confidence"], outside["confidence"]]).squeeze(-1)
    is_forget = np.arange(len(confidences)) < len(targets["confidence"])
    result["auc"] = float(roc_auc_score(is_forget, confidences))
    return result
