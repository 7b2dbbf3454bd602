"""What unlearning is judged by: predictions, attacks, and the cost of a step."""

from eupmu_jax.evaluation.cost import step_cost
from eupmu_jax.evaluation.likelihood_ratio import likelihood_ratio_attack, logit_confidence
from eupmu_jax.evaluation.membership import membership_attack, membership_features
from eupmu_jax.evaluation.relearning import relearning_curve
from eupmu_jax.evaluation.scores import (
    accuracy,
    average_gap,
    classification_scores,
    is_over_forgetting,
    kl_divergence,
    tug_of_war,
)

__all__ = [
    "accuracy",
    "average_gap",
    "classification_scores",
    "is_over_forgetting",
    "kl_divergence",
    "likelihood_ratio_attack",
    "logit_confidence",
    "membership_attack",
    "membership_features",
    "relearning_curve",
    "step_cost",
    "tug_of_war",
]
