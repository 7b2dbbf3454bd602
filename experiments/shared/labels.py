"""The losses of a classifier and its labels, in the form that the unlearning methods take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.shared.methods.method import LossFunctions

Apply = Callable[[Any, Any], jax.Array]
"""(params, images) -> logits [n, classes]."""


class LabelledExamples(NamedTuple):
    """Images, their labels, and another label for each: what it is to be taken for once it is forgotten."""

    x: jax.Array
    y: jax.Array
    wrong: jax.Array


def cross_entropy(apply: Apply, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Of each example [n], in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels)


def label_losses(apply: Apply, temperature: float = 4.0) -> LossFunctions:
    """Forgetting is being taken for the wrong label; training is cross-entropy; divergence is distillation.

    Source: Golatkar et al., arXiv 1911.04933, for the wrong labels.
    """

    def divergence(reference, params, examples):
        logits = apply(reference, examples.x), apply(params, examples.x)
        return distillation(*logits, temperature)

    return LossFunctions(
        forget=lambda params, examples: cross_entropy(apply, params, examples.x, examples.wrong).mean(),
        training=lambda params, examples: cross_entropy(apply, params, examples.x, examples.y),
        divergence=divergence,
    )


def distillation(teacher_logits: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """temperature^2 KL(teacher || student) of softened predictions, mean over the batch."""
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), -1))
