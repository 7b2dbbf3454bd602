"""Machine unlearning for JAX: forget under a bound on the utility that is lost.

EUPMU (implicit gradient surgery, arXiv 2510.22124) as an Optax transformation.
"""

from eupmu_jax import objectives as objectives
from eupmu_jax.cli.exported import export_model, load_model
from eupmu_jax.method.accumulation import accumulated
from eupmu_jax.method.constraints import Budget, Tolerance
from eupmu_jax.method.eupmu import eupmu
from eupmu_jax.method.explicit import explicit_surgery
from eupmu_jax.method.gradient import forget_and_retain_grads
from eupmu_jax.method.implicit import implicit_surgery
from eupmu_jax.method.lagrangian import Weighted, lagrangian, saddle_point, weighted
from eupmu_jax.method.layouts import training_step
from eupmu_jax.method.losses import Losses, Mean
from eupmu_jax.method.projection import unilateral_projection
from eupmu_jax.method.state import SurgeryInfo, multiplier, surgery_info
from eupmu_jax.run.promise import Promise, verdict
from eupmu_jax.run.stopping import exhausted, over_forgetting, reached
from eupmu_jax.run.tensorboard import tensorboard
from eupmu_jax.run.unlearn import History, unlearn

__version__ = "0.2.0"

__all__ = [
    "Budget",
    "History",
    "Losses",
    "Mean",
    "Promise",
    "SurgeryInfo",
    "Tolerance",
    "Weighted",
    "accumulated",
    "eupmu",
    "exhausted",
    "explicit_surgery",
    "export_model",
    "forget_and_retain_grads",
    "implicit_surgery",
    "lagrangian",
    "load_model",
    "multiplier",
    "over_forgetting",
    "reached",
    "saddle_point",
    "surgery_info",
    "tensorboard",
    "training_step",
    "unilateral_projection",
    "unlearn",
    "verdict",
    "weighted",
]
