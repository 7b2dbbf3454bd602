"""Machine unlearning for JAX: forget under a bound on the utility that is lost.

EUPMU (implicit gradient surgery, arXiv 2510.22124) as an Optax transformation.
"""

from eupmu_jax import objectives as objectives
from eupmu_jax.accumulation import accumulated
from eupmu_jax.callbacks import exhausted, over_forgetting, reached, tensorboard
from eupmu_jax.dual import SurgeryInfo, multiplier, surgery_info
from eupmu_jax.explicit import explicit_surgery, unilateral_projection
from eupmu_jax.exported import export_model, load_model
from eupmu_jax.gradient import forget_and_retain_grads
from eupmu_jax.implicit import implicit_surgery
from eupmu_jax.layouts import training_step
from eupmu_jax.losses import Losses, Mean
from eupmu_jax.method import eupmu
from eupmu_jax.unlearning import History, unlearn

__version__ = "0.1.0"

__all__ = [
    "History",
    "Losses",
    "Mean",
    "SurgeryInfo",
    "accumulated",
    "eupmu",
    "exhausted",
    "explicit_surgery",
    "export_model",
    "forget_and_retain_grads",
    "implicit_surgery",
    "load_model",
    "multiplier",
    "over_forgetting",
    "reached",
    "surgery_info",
    "tensorboard",
    "training_step",
    "unilateral_projection",
    "unlearn",
]
