"""The losses of a classifier and its labels, in the form that the unlearning methods take."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eupmu_jax import objectives
from experiments.shared.methods.method import LossFunctions

Apply = Callable[[Any, Any], jax.Array]
"""(params, images) -> logits [n, classes]."""


class LabelledExamples(NamedTuple):
    """Images, their labels, and what each is to become once it is forgotten.

    Attributes:
      x, y: images and their labels.
      wrong: another label for each, that it is to be taken for.
      unseen: how confident of its label a model would be that had never seen it, in nats; NaN where
        nothing is to be forgotten. It depends on the model that is to forget: see `unseen_targets`.
    """

    x: jax.Array
    y: jax.Array
    wrong: jax.Array
    unseen: jax.Array | None = None


ForgetLoss = Literal["wrong labels", "unseen confidence"]
"""What is minimised in order to forget: a key of FORGET_LOSSES."""


def to_wrong_labels(logits: jax.Array, examples: LabelledExamples) -> jax.Array:
    """Cross-entropy of the wrong label.

    Source: Golatkar et al., arXiv 1911.04933.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples.wrong)


def to_unseen_confidence(logits: jax.Array, examples: LabelledExamples) -> jax.Array:
    """How far the confidence of the true label is from that of an example never seen."""
    assert examples.unseen is not None, "the loop gives every example its target"
    return objectives.confidence_target(logits, examples.y, examples.unseen)


FORGET_LOSSES: Mapping[ForgetLoss, Callable[[jax.Array, LabelledExamples], jax.Array]] = {
    "wrong labels": to_wrong_labels,
    "unseen confidence": to_unseen_confidence,
}
"""(logits, examples) -> [n]."""


def cross_entropy(apply: Apply, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Of each example [n], in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels)


def label_losses(
    apply: Apply, forget: ForgetLoss = "wrong labels", *, temperature: float = 4.0
) -> LossFunctions:
    """Training is cross-entropy; divergence is distillation at that temperature."""
    forget_loss = FORGET_LOSSES[forget]

    def divergence(reference, params, examples):
        logits = apply(reference, examples.x), apply(params, examples.x)
        return distillation(*logits, temperature)

    return LossFunctions(
        forget=lambda params, examples: forget_loss(apply(params, examples.x), examples).mean(),
        training=lambda params, examples: cross_entropy(apply, params, examples.x, examples.y),
        divergence=divergence,
    )


def distillation(teacher_logits: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """temperature^2 KL(teacher || student) of softened predictions, mean over the batch."""
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), -1))
