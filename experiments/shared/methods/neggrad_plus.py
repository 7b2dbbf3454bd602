"""NegGrad+: descent on the retain set and ascent on the forget set, in one weighted sum."""

import jax
import optax

import eupmu_jax as eu
from experiments.shared.methods.method import LossFunctions, Method, ascent_and_retain, weighted


def neggrad_plus(
    losses: LossFunctions, optimizer: optax.GradientTransformation, *, ascent: jax.Array | float
) -> Method:
    """Descends (1 - ascent) R - ascent times the training loss of the forget batch, ascent in (0, 1).

    Source: Kurmanji et al., arXiv 2302.09880, section 4 (1 - beta there).
    """
    return weighted(ascent_and_retain(losses), optimizer, lambda batch: eu.Losses(ascent, 1 - ascent))
