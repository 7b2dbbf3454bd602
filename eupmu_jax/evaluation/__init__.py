"""What an unlearned classifier is judged by, from predicted probabilities and labels."""

from eupmu_jax.evaluation.membership import membership_attack, membership_features
from eupmu_jax.evaluation.scores import (
    accuracy,
    average_gap,
    classification_scores,
    kl_divergence,
    tug_of_war,
)

__all__ = [
    "accuracy",
    "average_gap",
    "classification_scores",
    "kl_divergence",
    "membership_attack",
    "membership_features",
    "tug_of_war",
]
