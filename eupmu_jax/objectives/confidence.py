"""Forgetting to the confidence of unseen examples: what an attack looks at, and nothing beyond."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from eupmu_jax.objectives.masks import (
    LOGITS,
    OF_TOKENS,
    check_shape,
    divergence,
    is_label,
    labelled,
    log_odds,
    log_softmax,
    mean_of_tokens,
    wide,
    wide_pair,
)


def confidence(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    r"""The log odds of each label, which tell a remembered example from an unseen one.

    .. math:: c = \log p_y - \log(1 - p_y) = z_y - \log \textstyle\sum_{i \ne y} e^{z_i}

    Range [-inf, inf], and finite for finite logits: neither end saturates. It is what
    `eupmu_jax.evaluation.logit_confidence` is for probabilities.

    Args:
      logits, labels, mask: as for `cross_entropy`; at least two classes.

    Returns:
      The shape of labels, [B] or [B, T], in nats, float32 or wider; NaN where the mask is False and, under
      jit, where the label is out of range.

    Raises:
      TypeError, ValueError: as for `cross_entropy`.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.confidence(jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([0, 0])).tolist()
      [0.0, 50.0]

    Source: Carlini et al., "Membership inference attacks from first principles" (arXiv 2112.03570).
    """
    at = labelled(logits, labels, mask)
    return jnp.where(at.counts, log_odds(at), jnp.nan)


def confidence_target(
    logits: ArrayLike,
    labels: ArrayLike,
    target: ArrayLike,
    reference_logits: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> jax.Array:
    r"""The distance of each label's confidence from a target: the confidence of an example never seen.

    .. math:: \mathrm{Huber}_1(c - t) + \mathrm{KL}(q \,\|\, p), \qquad
        c = \log p_y - \log(1 - p_y), \qquad
        \mathrm{Huber}_1(d) = \begin{cases} d^2 / 2 & |d| \le 1 \\ |d| - 1/2 & \text{otherwise} \end{cases}

    The second term is there with reference_logits alone: p and q are the predictions of the model and of the
    reference *among the classes other than y*, where the model is to change nothing. Over tokens it is the
    mean over those that count. Range [0, inf), 0 only where the target is met. It is two-sided: beyond the
    target it pulls back, for an example that is less certain than an unseen one is conspicuous, too.

    Args:
      logits: floating [B, C], or [B, T, V], of the forget set; at least two classes.
      labels: integers [B], or [B, T].
      target: t in nats, floating, of the shape of labels, such as `unseen_confidence`. No gradient flows into
        it.
      reference_logits: those of the model before unlearning, of the shape of logits. No gradient flows into
        them. None leaves the second term out.
      mask: bool of the shape of labels, True where an entry counts; None for all.

    Returns:
      [B] in nats, float32 or wider; NaN as for `cross_entropy`.

    Raises:
      TypeError, ValueError: as for `cross_entropy`; a target or reference of another shape.

    Example:
      >>> from eupmu_jax import objectives
      >>> logits = jnp.array([[3.0, 0.0], [0.5, 0.0]])
      >>> objectives.confidence_target(logits, jnp.array([0, 0]), jnp.array([0.0, 0.0])).tolist()
      [2.5, 0.125]

    Source: Carlini et al., arXiv 2112.03570, for the confidence; the loss is ours.
    """
    if reference_logits is not None:
        logits, reference_logits = wide_pair(
            "logits", logits, "reference_logits", reference_logits, LOGITS, [2, 3]
        )
    at = labelled(logits, labels, mask)
    check_shape("target", target, at.labels.shape, "that of labels")
    target = wide("target", target, OF_TOKENS, [1, 2]).astype(at.logits.dtype)
    values = optax.losses.huber_loss(log_odds(at), jax.lax.stop_gradient(target))
    if reference_logits is not None:
        among_others = lambda logits: log_softmax(jnp.where(is_label(at), -jnp.inf, logits), at.counts)
        values = values + divergence(among_others(reference_logits), among_others(at.logits))
    return mean_of_tokens(values, at.counts)


def unseen_confidence(
    c_forget: ArrayLike,
    phi_forget: ArrayLike,
    c_held_out: ArrayLike,
    phi_held_out: ArrayLike,
    bins: int | None,
) -> np.ndarray:
    r"""What each confidence would be if the example had never been seen: a quantile of held-out ones.

    .. math:: t_i = Q_{\{c_j \,:\, j \in \text{held out}, \; \phi_j \approx \phi_i\}}(u_i), \qquad
        u_i = \text{rank of } c_i \text{ among } \{c_j \,:\, j \in \text{forget}, \; \phi_j \approx \phi_i\}

    An example keeps its rank u_i among those like it; the distribution becomes that of unseen examples like
    it. What "like it" means, phi says: of each set the 1 / bins of the examples whose phi is nearest, and
    all that are as near; or those with the same phi.

    The finer phi foretells an unseen confidence, the closer the target. Best is the confidence under a
    reference model that was trained, however briefly, without the forget and the held-out examples. Without
    one take the class, or for a token what stands at its place: (field of the record, index of the token).

    Args:
      c_forget: `confidence` of the forget examples under the model before unlearning, finite, real [n].
      phi_forget: what tells how hard each is, real [n] or [n, d].
      c_held_out: as c_forget, of examples from the same source that the model was not trained on, [m].
      phi_held_out: as phi_forget, [m] or [m, d].
      bins: into how many parts phi cuts each set, an int from 1 to the smaller of n and m; 1 compares all
        with all. None for a phi that names groups, such as classes: those with the same phi are compared.

    Returns:
      The targets t for `confidence_target`, float64 [n], in nats: computed once, before the run, and stored
      beside the forget examples. With the forget set as its own held-out set they are c_forget.

    Raises:
      TypeError: bins that are neither an int nor None.
      ValueError: other shapes, values that are not finite, bins out of range, a forget example whose phi no
        held-out example has (bins=None).

    Example:
      >>> from eupmu_jax import objectives
      >>> seen, classes = [9.0, 7.0, 8.0], [0, 0, 1]
      >>> unseen, unseen_classes = [1.0, 3.0, -2.0, 0.0], [0, 0, 1, 1]
      >>> objectives.unseen_confidence(seen, classes, unseen, unseen_classes, bins=None)
      array([ 3.,  1., -1.])
    """
    c, phi = _checked("forget", c_forget, phi_forget)
    c_unseen, phi_unseen = _checked("held_out", c_held_out, phi_held_out)
    if phi.shape[1] != phi_unseen.shape[1]:
        raise ValueError(
            f"phi_forget and phi_held_out must have as many columns, got {np.shape(phi_forget)} and "
            f"{np.shape(phi_held_out)}"
        )
    fewest = min(len(c), len(c_unseen))
    if bins is not None and not 1 <= operator.index(bins) <= fewest:
        raise ValueError(
            f"bins must lie in [1, {fewest}], the number of examples of the smaller set, got {bins}"
        )

    def like(center: np.ndarray, phi: np.ndarray) -> np.ndarray:
        distance = np.sum((phi - center) ** 2, -1)
        if bins is None:
            return distance == 0
        nearest = -(-len(phi) // bins)
        return distance <= np.partition(distance, nearest - 1)[nearest - 1]

    targets = np.empty(len(c))
    for i, center in enumerate(phi):
        seen, unseen = c[like(center, phi)], c_unseen[like(center, phi_unseen)]
        if len(unseen) == 0:
            raise ValueError(
                f"no held-out example has the phi of forget example {i}, {center.tolist()}: with bins=None "
                "every group needs one; add some, or give a number of bins to take the nearest"
            )
        # Half of its ties, itself among them, lie below: the inverse of Hazen's quantile.
        rank = (np.mean(seen < c[i]) + np.mean(seen <= c[i])) / 2
        targets[i] = np.quantile(unseen, rank, method="hazen")
    return targets


def _checked(name: str, c: ArrayLike, phi: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Confidences [n] and phi [n, d] in float64, n >= 1; ValueError unless they are finite."""
    c, phi = np.asarray(c, np.float64), np.asarray(phi, np.float64)
    if c.ndim != 1 or len(c) == 0:
        raise ValueError(f"c_{name} must have the shape [n], n >= 1, got {c.shape}")
    if phi.ndim not in (1, 2) or len(phi) != len(c):
        raise ValueError(f"phi_{name} must have the shape [{len(c)}] or [{len(c)}, d], got {phi.shape}")
    for what, values in (("c", c), ("phi", phi)):
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{what}_{name} must be finite: leave out what does not count")
    return c, phi.reshape(len(c), -1)
