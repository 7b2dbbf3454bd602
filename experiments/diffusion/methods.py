"""The methods that are compared, all with Adam, at the same number of steps and the same rate."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import optax

import eupmu_jax as eu
from eupmu_jax.method.constraints import Constraint
from experiments.diffusion.losses import AWAY, TO_ANOTHER, TO_NOTHING, Redirect
from experiments.shared.methods.exact_surgery import exact_surgery
from experiments.shared.methods.method import Method
from experiments.shared.methods.salun import salun

BUDGET_SHARE = 0.03
"""How much the denoising loss of what is kept may rise, of what it was."""


FALL = 0.01
"""How much that loss is asked to fall in a step, of what it was, where a method asks for it."""


Utilities = Literal["together", "near and far", "each class"]


class Unlearning(NamedTuple):
    """What `eu.unlearn` is given.

    Attributes:
      constraint: from the original's loss of what is retained, or those of each class.
      redirect: what is predicted in the concept's place.
      utilities: what has a retain loss of its own: nothing, what is near the concept and what is far from it,
        or every class that is kept.
      whatever_asked: whether the concept's pictures are redirected for vectors around its label's, too.
      multiplier: the weight of the retain losses that it starts from, in all.
    """

    constraint: Callable[[np.ndarray], Constraint]
    redirect: Redirect = TO_ANOTHER
    utilities: Utilities = "together"
    multiplier: float = 1.0
    whatever_asked: bool = False


class Peer(NamedTuple):
    """A method of others, that takes gradients apart or masks them.

    Attributes:
      make: (losses, optimizer, **knobs) -> Method.
      knobs: its settings.
    """

    make: Callable[..., Method]
    knobs: Mapping[str, float]


def budget(losses: np.ndarray) -> Constraint:
    return eu.Budget(BUDGET_SHARE * losses)


def constant(losses: np.ndarray) -> Constraint:
    """Without a dual step the multiplier stays at what it starts from."""
    return eu.Tolerance(0.0, dual_optimizer=optax.set_to_zero())


HEADLINE = "EUPMU budget"
NEAR_AND_FAR = "EUPMU budget, near and far"
METHODS: dict[str, Unlearning | Peer] = {
    HEADLINE: Unlearning(budget),
    NEAR_AND_FAR: Unlearning(budget, utilities="near and far"),
    "EUPMU budget, each class": Unlearning(budget, utilities="each class"),
    "EUPMU budget, whatever is asked": Unlearning(budget, whatever_asked=True),
    "EUPMU lagged": Unlearning(lambda losses: eu.Tolerance(0.0)),
    "EUPMU look-ahead": Unlearning(lambda losses: eu.Tolerance(0.0, measure="lookahead")),
    "EUPMU look-ahead, a fall": Unlearning(lambda losses: eu.Tolerance(-FALL * losses, measure="lookahead")),
    "constant weight": Unlearning(constant),
    "redirect alone": Unlearning(constant, multiplier=0.0),
    "SalUn": Peer(salun, {"weight": 1.0}),
    "exact surgery": Peer(exact_surgery, {"demand": 0.0}),
    "ESD": Unlearning(constant, redirect=AWAY, multiplier=0.0),
    "EUPMU budget, to nothing": Unlearning(budget, redirect=TO_NOTHING),
}
