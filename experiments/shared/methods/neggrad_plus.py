"""NegGrad+: descent on the retain set and ascent on the forget set, in one weighted sum."""

import optax

import eupmu_jax as eu
from experiments.shared.methods.method import Apply, Method, ascent_losses, weighted


def neggrad_plus(apply: Apply, optimizer: optax.GradientTransformation, *, ascent) -> Method:
    """Descends (1 - ascent) R - ascent CE(forget), ascent in (0, 1).

    Source: Kurmanji et al., arXiv 2302.09880, section 4 (1 - beta there).
    """
    return weighted(ascent_losses(apply), optimizer, lambda batch: eu.Losses(ascent, 1 - ascent))
