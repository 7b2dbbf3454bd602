"""What unlearning is judged by: predictions, texts, attacks, and the cost of a step."""

from eupmu_jax.evaluation.cost import step_cost
from eupmu_jax.evaluation.extraction import exact_memorisation, extraction_strength, verbatim_prefix
from eupmu_jax.evaluation.likelihood_ratio import likelihood_ratio_attack, logit_confidence
from eupmu_jax.evaluation.membership import membership_attack, membership_features
from eupmu_jax.evaluation.muse import min_k_log_probability, priv_leak
from eupmu_jax.evaluation.relearning import relearning_curve
from eupmu_jax.evaluation.rouge import rouge_l
from eupmu_jax.evaluation.scores import (
    accuracy,
    average_gap,
    classification_scores,
    is_over_forgetting,
    kl_divergence,
    tug_of_war,
)
from eupmu_jax.evaluation.tofu import (
    forget_quality,
    forget_truth_ratio,
    model_utility,
    truth_ratio,
    utility_truth_ratio,
)

__all__ = [
    "accuracy",
    "average_gap",
    "classification_scores",
    "exact_memorisation",
    "extraction_strength",
    "forget_quality",
    "forget_truth_ratio",
    "is_over_forgetting",
    "kl_divergence",
    "likelihood_ratio_attack",
    "logit_confidence",
    "membership_attack",
    "membership_features",
    "min_k_log_probability",
    "model_utility",
    "priv_leak",
    "relearning_curve",
    "rouge_l",
    "step_cost",
    "truth_ratio",
    "tug_of_war",
    "utility_truth_ratio",
    "verbatim_prefix",
]
