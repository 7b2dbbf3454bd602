"""Objectives on labels: cross-entropy, wrong labels, ascent, unlikelihood, and divergences of predictions."""

import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eupmu_jax.objectives.masks import (
    LOGITS,
    checked_labels,
    divergence,
    labelled,
    log_odds,
    log_probability,
    log_softmax,
    mean_of_tokens,
    what_counts,
    wide,
    wide_pair,
)


def cross_entropy(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    r"""Cross-entropy to the labels: a retain loss, and with `wrong_labels` a forget loss.

    .. math:: -\log p_y, \quad p = \mathrm{softmax}(\text{logits});
        \qquad \text{over the tokens that count: their mean}

    Range [0, inf], infinite for a label whose logit is -inf. With the *true* labels of the forget set it is
    no forget loss: minimising it learns them. With wrong labels it pulls to confident errors, which a strong
    attack tells from a retrained model's predictions.

    Args:
      logits: floating [B, C], or [B, T, V].
      labels: integers [B], or [B, T].
      mask: bool of the shape of labels, True where an entry counts; None for all.

    Returns:
      [B] in nats, float32 or wider. Under jit a label outside [0, C) gives NaN, so that the step is skipped.

    Raises:
      TypeError: logits that are not floating, labels that are not integers, a mask that is not boolean.
      ValueError: other shapes; labels outside [0, C), where they are known.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4)
      Array([1.3863], dtype=float32)

    Source: Golatkar et al., arXiv 1911.04933, for random labels as a forget loss.
    """
    at = labelled(logits, labels, mask)
    return mean_of_tokens(-log_probability(at), at.counts)


def wrong_labels(
    key: jax.Array, labels: ArrayLike, num_classes: int, mask: ArrayLike | None = None
) -> jax.Array:
    r"""A wrong label for each example, uniform among the classes other than its own.

    .. math:: P(\tilde y = c) = [c \neq y] \;/\; (C - 1)

    Labels that are drawn once, before the run, pull every example to one class. Labels that are drawn anew in
    each step pull to the uniform distribution over the other classes.

    Args:
      key: a JAX random key.
      labels: true classes, integers of any shape.
      num_classes: C >= 2, a Python int.
      mask: bool of the shape of labels, True where an entry counts; None for all.

    Returns:
      int32 of the shape of labels, in [0, C). It is -1, which no objective takes, where the mask is False
      and, under jit, where the label is outside [0, C).

    Raises:
      TypeError: labels that are not integers, a num_classes that is no int, a mask that is not boolean.
      ValueError: num_classes < 2; a mask of another shape; labels outside [0, C), where they are known.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.wrong_labels(jax.random.key(0), jnp.array([0, 1, 1]), num_classes=2).tolist()
      [1, 0, 0]

    Source: Golatkar et al., arXiv 1911.04933.
    """
    num_classes = operator.index(num_classes)
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, for there to be a wrong class; got {num_classes}")
    counts = what_counts(mask, jnp.shape(labels))
    labels, in_range = checked_labels("labels", labels, counts, num_classes)
    # A shift by 1 to C - 1 classes never comes back to the label.
    wrong = (labels + jax.random.randint(key, labels.shape, 1, num_classes, jnp.int32)) % num_classes
    return jnp.where(in_range & counts, wrong, -1)


def gradient_ascent(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    r"""Minus the cross-entropy to the true labels: a forget loss without a floor.

    .. math:: \log p_y; \qquad \text{over the tokens that count: their mean}

    Range [-inf, 0]. Nothing stops it, and it pushes hardest where a label is least probable already.
    `unlikelihood` and `npo` ease off there. It is negative, so it needs raw losses (log_losses=False).

    Args:
      logits, labels, mask: as for `cross_entropy`, of the forget set.

    Returns:
      [B] in nats, float32 or wider; NaN as for `cross_entropy`.

    Raises:
      TypeError, ValueError: as for `cross_entropy`.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.gradient_ascent(jnp.zeros((1, 4)), jnp.array([2])).round(4)
      Array([-1.3863], dtype=float32)

    Source: Golatkar et al., arXiv 1911.04933; for language models Jang et al., arXiv 2210.01504.
    """
    return -cross_entropy(logits, labels, mask)


def unlikelihood(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    r"""Gradient ascent that is bounded below: it is done when the label has no probability left.

    .. math:: -\log(1 - p_y); \qquad \text{over the tokens that count: their mean}

    Range [0, inf). It is 0 only at p_y = 0, where its gradient vanishes, too. For a small p_y it is about
    p_y, for p_y near 1 about the margin of the label's logit. Both ends are computed accurately.

    Args:
      logits, labels, mask: as for `cross_entropy`, of the forget set; at least two classes.

    Returns:
      [B] in nats, float32 or wider; NaN as for `cross_entropy`.

    Raises:
      TypeError, ValueError: as for `cross_entropy`.

    Example:
      >>> from eupmu_jax import objectives
      >>> logits = jnp.array([[0.0, 0.0], [1e4, 0.0], [-10.0, 0.0]])
      >>> objectives.unlikelihood(logits, jnp.array([0, 0, 0])).round(6)
      Array([6.93147e-01, 1.00000e+04, 4.50000e-05], dtype=float32)

    Source: Welleck et al., arXiv 1908.04319, with the label as the only negative candidate.
    """
    at = labelled(logits, labels, mask)
    # 1 / (1 - p_y) = 1 + odds, which neither end rounds away.
    return mean_of_tokens(jax.nn.softplus(log_odds(at)), at.counts)


def kl_to_uniform(logits: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    r"""The divergence of the prediction from the uniform one, a forget loss that pulls to ignorance.

    .. math:: \mathrm{KL}(u \,\|\, p) = -\tfrac1C \textstyle\sum_c \log p_c - \log C, \quad u_c = 1/C

    Range [0, inf), 0 only for equal logits. The gradient is p - u. It does not vanish on a confident
    prediction, as that of KL(p || u) does. A class whose logit is -inf is left out: u is uniform over the
    others.

    Args:
      logits: floating [B, C], or [B, T, V], of the forget set.
      mask: bool [B], or [B, T], True where an entry counts; None for all.

    Returns:
      [B] in nats, float32 or wider, the mean over the tokens that count.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.kl_to_uniform(jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8]]))).round(2)
      Array([0.  , 0.22], dtype=float32)

    Source: Lee et al., arXiv 1711.09325, for inputs that a classifier shall not know.
    """
    logits = wide("logits", logits, LOGITS, [2, 3])
    counts = what_counts(mask, logits.shape[:-1])
    log_p = log_softmax(logits, counts)
    is_class = log_p != -jnp.inf  # true of NaN, which has to come through
    classes = jnp.sum(is_class, -1, dtype=log_p.dtype)
    return mean_of_tokens(-jnp.sum(jnp.where(is_class, log_p, 0), -1) / classes - jnp.log(classes), counts)


def kl_to_reference(
    logits: ArrayLike, reference_logits: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    r"""The divergence from a reference model's prediction, such as the original's on retain data.

    .. math:: \mathrm{KL}(q \,\|\, p) = \textstyle\sum_c q_c (\log q_c - \log p_c), \quad
        q = \mathrm{softmax}(\text{reference})

    Range [0, inf], 0 only for equal predictions, up to rounding. It is infinite where the model rules out
    what the reference allows. A class whose logit is -inf in both adds nothing. The gradient is p - q, and
    none flows into the reference.

    Args:
      logits: those of the model, floating [B, C], or [B, T, V].
      reference_logits: those of the reference, floating, of the same shape.
      mask: bool [B], or [B, T], True where an entry counts; None for all.

    Returns:
      [B] in nats, float32 or wider, the mean over the tokens that count.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> from eupmu_jax import objectives
      >>> logits, reference = jnp.zeros((1, 2)), jnp.array([[0.0, -jnp.inf]])
      >>> objectives.kl_to_reference(logits, reference).round(4)
      Array([0.6931], dtype=float32)

    Source: Hinton et al., arXiv 1503.02531; to keep utility in unlearning Maini et al., arXiv 2401.06121.
    """
    logits, reference_logits = wide_pair(
        "logits", logits, "reference_logits", reference_logits, LOGITS, [2, 3]
    )
    counts = what_counts(mask, logits.shape[:-1])
    log_p, log_q = log_softmax(logits, counts), log_softmax(reference_logits, counts)
    return mean_of_tokens(divergence(log_q, log_p), counts)
