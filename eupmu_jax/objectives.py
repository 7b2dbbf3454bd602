"""Forget and retain losses to build `Losses` from, as values per example, with masks.

For classification logits are [B, C], labels [B] and mask [B]; for sequences logits are [B, T, V], labels
[B, T] and mask [B, T], where logits[:, t] predict labels[:, t]: shift them yourself. A mask is True where
an entry counts; where it is False, logits may be NaN and labels anything (-100, say), in the value and in the
gradient. A value is NaN where nothing of its example counts, so that none of it passes for a zero: leave
it out with `masked_mean`. All is computed in float32 or wider, and in nats.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from eupmu_jax.losses import Mean, accumulation_dtype

__all__ = [
    "cross_entropy",
    "gradient_ascent",
    "kl_to_reference",
    "kl_to_uniform",
    "masked_mean",
    "noise_prediction_redirect",
    "npo",
    "sequence_log_probability",
    "simnpo",
    "unlikelihood",
    "wrong_labels",
]

_LOGITS, _VALUES = "[B, C] or [B, T, V]", "[B], one for each example"


def masked_mean(values: Any, mask: Any = None) -> Mean:
    r"""The mean of values over the examples that count, as the sum and the count that `Losses` takes.

    .. math:: \textstyle\sum_b m_b v_b \;/\; \sum_b m_b

    A value that does not count may be NaN or infinite: it enters neither the mean nor the gradient with
    respect to values. Where the network itself is NaN there, give the objective the mask as well.

    Args:
      values: per example, floating [B], as the functions of this module return.
      mask: bool [B], True for an example that counts; None for all. For tokens [B, T]: mask.any(-1).

    Returns:
      `Mean` of total [] and count [], float32 or wider; of no examples the count is 0.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> from eupmu_jax import objectives
      >>> mean = objectives.masked_mean(jnp.array([1.0, jnp.nan, 4.0]), jnp.array([True, False, True]))
      >>> float(mean.total), float(mean.count)
      (5.0, 2.0)

    Source: ours.
    """
    values = _wide("values", values, _VALUES, [1])
    counts = _counts(mask, values.shape)
    return Mean(jnp.sum(jnp.where(counts, values, 0)), jnp.sum(counts, dtype=values.dtype))


def cross_entropy(logits: Any, labels: Any, mask: Any = None) -> jax.Array:
    r"""Cross-entropy to the labels: a retain loss, and with `wrong_labels` a forget loss.

    .. math:: -\log p_y, \quad p = \mathrm{softmax}(\text{logits});
        \qquad \text{over the tokens that count: their mean}

    Range [0, inf); inf for a label whose logit is -inf. With wrong labels on the forget set it pulls to
    confident errors, which a strong attack tells from a retrained model's.

    Args:
      logits: floating [B, C], or [B, T, V].
      labels: integers [B], or [B, T].
      mask: bool of the shape of labels, True where an entry counts; None for all.

    Returns:
      [B] in nats, float32 or wider. A label outside [0, C) makes it NaN under jit, so that the
      step is skipped.

    Raises:
      TypeError: logits that are not floating, labels that are not integers, a mask that is not boolean.
      ValueError: other shapes; labels outside [0, C), where they are known.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4)
      Array([1.3863], dtype=float32)

    Source: standard; random labels as a forget loss after Golatkar et al., arXiv 1911.04933.
    """
    _, log_p_label, _, counts = _label_log_probability(logits, labels, mask)
    return _mean_of_tokens(-log_p_label, counts)


def wrong_labels(key: jax.Array, labels: Any, num_classes: int, mask: Any = None) -> jax.Array:
    r"""A label for each example, uniform among the classes other than its own.

    .. math:: P(\tilde y = c) = [c \neq y] \;/\; (C - 1)

    Draw them once, before the run, to pull every example to one class; anew in each step, and the pull
    is to the uniform distribution over the other classes.

    Args:
      key: a JAX random key.
      labels: the true classes, integers of any shape.
      num_classes: C >= 2, a Python int.
      mask: bool of the shape of labels, True where an entry counts; None for all.

    Returns:
      int32 of the shape of labels, in [0, C); -1, which no objective takes, where the mask is False or,
      under jit, where the label is outside [0, C).

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
    counts = _counts(mask, jnp.shape(labels))
    labels, in_range = _checked_labels("labels", labels, counts, num_classes)
    # A shift by 1 to C - 1 classes never comes back to the label.
    wrong = (labels + jax.random.randint(key, labels.shape, 1, num_classes, jnp.int32)) % num_classes
    return jnp.where(in_range & counts, wrong, -1)


def gradient_ascent(logits: Any, labels: Any, mask: Any = None) -> jax.Array:
    r"""Minus the cross-entropy to the true labels.

    .. math:: \log p_y; \qquad \text{over the tokens that count: their mean}

    Range (-inf, 0]: nothing stops it, and it pushes hardest where a label is least probable already;
    `unlikelihood` and `npo` ease off. It is negative, so it needs raw losses (log_losses=False).

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


def unlikelihood(logits: Any, labels: Any, mask: Any = None) -> jax.Array:
    r"""Gradient ascent that is bounded below: it is done when the label has no probability left.

    .. math:: -\log(1 - p_y); \qquad \text{over the tokens that count: their mean}

    Range [0, inf), 0 only at p_y = 0, where its gradient vanishes, too. It is about p_y for a small p_y and
    the margin of the label's logit for p_y near 1, accurate at both ends.

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
    log_p, log_p_label, labels, counts = _label_log_probability(logits, labels, mask)
    # 1 - p_y cancels for p_y near 1, the sum of the others rounds p_y away when it is near 0.
    is_probable = log_p_label > math.log(0.5)
    is_other = jax.lax.broadcasted_iota(labels.dtype, log_p.shape, log_p.ndim - 1) != labels[..., None]
    others = jax.nn.logsumexp(jnp.where(is_other, log_p, -jnp.inf), -1)
    improbable = jnp.where(is_probable, -1, log_p_label)
    return _mean_of_tokens(jnp.where(is_probable, -others, -jnp.log1p(-jnp.exp(improbable))), counts)


def kl_to_uniform(logits: Any, mask: Any = None) -> jax.Array:
    r"""Divergence of the prediction from the uniform one: pulls to knowing nothing.

    .. math:: \mathrm{KL}(u \,\|\, p) = -\tfrac1C \textstyle\sum_c \log p_c - \log C, \quad u_c = 1/C

    Range [0, inf), 0 only for equal logits. The gradient is p - u: it does not vanish on a sure prediction,
    as that of KL(p || u) does. A class whose logit is -inf is ruled out: u is uniform over the others.

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
    logits = _wide("logits", logits, _LOGITS, [2, 3])
    counts = _counts(mask, logits.shape[:-1])
    log_p = _log_softmax(logits, counts)
    is_class = log_p != -jnp.inf  # true of NaN, which has to come through
    classes = jnp.sum(is_class, -1, dtype=log_p.dtype)
    return _mean_of_tokens(-jnp.sum(jnp.where(is_class, log_p, 0), -1) / classes - jnp.log(classes), counts)


def kl_to_reference(logits: Any, reference_logits: Any, mask: Any = None) -> jax.Array:
    r"""Divergence from a reference model's prediction, such as the original's on retain data.

    .. math:: \mathrm{KL}(q \,\|\, p) = \textstyle\sum_c q_c (\log q_c - \log p_c), \quad
        q = \mathrm{softmax}(\text{reference})

    Range [0, inf), 0 only for equal predictions, up to rounding; inf where the model rules out what the
    reference allows, while a class with a logit of -inf in both adds nothing. The gradient is p - q, and
    none flows into the reference.

    Args:
      logits: the model's, floating [B, C], or [B, T, V].
      reference_logits: floating, of the same shape.
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
    names = "logits", "reference_logits"
    logits, reference_logits = _wide_pair(names, (logits, reference_logits), _LOGITS, [2, 3])
    counts = _counts(mask, logits.shape[:-1])
    log_p, log_q = _log_softmax(logits, counts), _log_softmax(reference_logits, counts)
    q = jnp.exp(log_q)
    adds = q != 0  # true of NaN, which has to come through
    ratio = jnp.where(adds, log_q, 0) - jnp.where(adds, log_p, 0)
    return _mean_of_tokens(jnp.sum(q * ratio, -1), counts)


def sequence_log_probability(logits: Any, targets: Any, mask: Any = None) -> jax.Array:
    r"""The log-probability of each sequence: what `npo` and `simnpo` take.

    .. math:: \log \pi(y) = \textstyle\sum_t m_t \log p_t(y_t)

    Range (-inf, 0]; 0 where no token counts.

    Args:
      logits: floating [B, T, V]; logits[:, t] predict targets[:, t].
      targets: integers [B, T].
      mask: bool [B, T], True where a token counts (the answer, not the prompt); None for all.

    Returns:
      [B] in nats, float32 or wider. A target outside [0, V) makes it NaN under jit. With labels
      [B], ``-cross_entropy(logits, labels)`` is the log-probability of a class.

    Raises:
      TypeError: as for `cross_entropy`.
      ValueError: other shapes; targets outside [0, V), where they are known.

    Example:
      >>> from eupmu_jax import objectives
      >>> targets, mask = jnp.array([[1, 0, -100]]), jnp.array([[True, True, False]])
      >>> objectives.sequence_log_probability(jnp.zeros((1, 3, 2)), targets, mask).round(4)
      Array([-1.3863], dtype=float32)

    Source: standard.
    """
    _, log_p_target, _, counts = _label_log_probability(logits, targets, mask, "targets", "[B, T, V]", [3])
    return jnp.sum(jnp.where(counts, log_p_target, 0), -1)


def npo(log_probability: Any, reference_log_probability: Any, beta: Any = 0.1) -> jax.Array:
    r"""Negative preference optimisation: gradient ascent that eases off as the reference is left behind.

    .. math:: -\tfrac2\beta \log\sigma\big(-\beta (\log\pi - \log\pi_\text{ref})\big)

    Range [0, inf), 2 log(2) / beta at the reference. Its gradient is that of log pi times
    2 pi^beta / (pi^beta + pi_ref^beta); as beta -> 0 that factor -> 1: gradient ascent on the sequence.

    Args:
      log_probability: log pi of each forget example, floating [B], from `sequence_log_probability`.
      reference_log_probability: the same under the model before unlearning; no gradient flows into it.
      beta: > 0, the inverse temperature; 0.1 is the paper's.

    Returns:
      [B], float32 or wider.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these; a beta that is not positive.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.npo(jnp.array([-5.0, -200.0]), jnp.array([-5.0, -5.0])).round(4)
      Array([13.8629,  0.    ], dtype=float32)

    Source: Zhang et al., arXiv 2404.05868.
    """
    names = "log_probability", "reference_log_probability"
    value, reference = _wide_pair(names, (log_probability, reference_log_probability), _VALUES, [1])
    return _preference(value - reference, beta)


def simnpo(log_probability: Any, length: Any, beta: Any, gamma: Any = 0.0) -> jax.Array:
    r"""NPO without a reference model: the log-probability per token takes the place of the ratio.

    .. math:: -\tfrac2\beta \log\sigma\big(-\tfrac{\beta}{|y|} \log\pi - \gamma\big)

    Range [0, inf). A larger gamma asks for less probability before it eases off.

    Args:
      log_probability: log pi of each forget example, floating [B], from `sequence_log_probability`.
      length: |y|, the tokens of each that count, real [B]: mask.sum(-1).
      beta: > 0, the inverse temperature, searched for each task by the paper's code, between 1 and 4.5.
      gamma: the reward margin, added to beta times nats per token; that code's gamma times beta.

    Returns:
      [B], float32 or wider; NaN for a length that is not positive, for `masked_mean` to leave out.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these; a beta that is not positive.

    Example:
      >>> from eupmu_jax import objectives
      >>> objectives.simnpo(jnp.array([0.0, -50.0]), jnp.array([5, 5]), beta=2.0).round(4)
      Array([0.6931, 0.    ], dtype=float32)

    Source: Fan et al., arXiv 2410.07163.
    """
    value = _wide("log_probability", log_probability, _VALUES, [1])
    _check_shape("length", length, value.shape, "that of log_probability")
    length = jnp.asarray(length).astype(value.dtype)
    per_token = value / jnp.where(length > 0, length, 1)
    return jnp.where(length > 0, _preference(per_token, beta, gamma), jnp.nan)


def noise_prediction_redirect(predicted_noise: Any, target_noise: Any, mask: Any = None) -> jax.Array:
    r"""For diffusion models: what is forgotten is denoised as if it were something else.

    .. math:: \tfrac1n \| \epsilon_\theta(x_t, c) - \mathrm{stop}(\epsilon(x_t, c')) \|^2

    for the class or prompt c to forget and another one c', at the same noisy x_t and time t; n is the
    number of entries of one example. Range [0, inf).

    Args:
      predicted_noise: for c, floating [B, ...].
      target_noise: for c', of the same shape; no gradient flows into it, whichever model it is from.
      mask: bool [B], True for an example that counts; None for all.

    Returns:
      [B], float32 or wider, the mean over all axes but the first, in squared units of the noise.

    Raises:
      TypeError, ValueError: dtypes and shapes other than these.

    Example:
      >>> from eupmu_jax import objectives
      >>> predicted, target = jnp.ones((1, 2, 2)), jnp.array([[[1.0, 1.0], [1.0, 3.0]]])
      >>> objectives.noise_prediction_redirect(predicted, target).tolist()
      [1.0]

    Source: SalUn (arXiv 2310.12508) and the EUPMU repository (arXiv 2510.22124).
    """
    names = "predicted_noise", "target_noise"
    predicted, target = _wide_pair(names, (predicted_noise, target_noise), "[B, ...]", range(1, 99))
    counts = _counts(mask, predicted.shape[:1])
    axes = tuple(range(1, predicted.ndim))
    difference = jnp.where(jnp.expand_dims(counts, axes), predicted - target, 0)
    return jnp.where(counts, jnp.mean(difference**2, axes), jnp.nan)


def _preference(log_ratio, beta, gamma=0.0):
    """-2 / beta log sigmoid(-beta log_ratio - gamma)."""
    if not isinstance(beta, Tracer) and not np.all(np.asarray(beta) > 0):
        raise ValueError(f"beta must be > 0, got {beta}")
    return 2 / beta * jax.nn.softplus(beta * log_ratio + gamma)


def _wide(name, array, wanted, ranks):
    """In float32 or wider, checked for its dtype and number of axes."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype}")
    if array.ndim not in ranks or array.shape[1:][-1:] == (0,):
        raise ValueError(f"{name} must have the shape {wanted}, got {array.shape}")
    return array.astype(accumulation_dtype(array))


def _wide_pair(names, arrays, wanted, ranks):
    """Two of one shape, in one dtype; no gradient flows into the second."""
    _check_shape(names[1], arrays[1], jnp.shape(arrays[0]), f"that of {names[0]}")
    first, second = (_wide(name, array, wanted, ranks) for name, array in zip(names, arrays, strict=True))
    dtype = accumulation_dtype(first, second)
    return first.astype(dtype), jax.lax.stop_gradient(second.astype(dtype))


def _check_shape(name, array, shape, why):
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} must have the shape {shape}, {why}; got {jnp.shape(array)}")


def _counts(mask, shape):
    """The mask, True everywhere if there is none."""
    if mask is None:
        return jnp.ones(shape, bool)
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool):
        raise TypeError(f"mask must be boolean, got {jnp.result_type(mask)}: pass mask > 0")
    _check_shape("mask", mask, shape, "an entry for each value or label")
    return jnp.asarray(mask)


def _log_softmax(logits, counts):
    # The derivative of a NaN is NaN even times 0: it is replaced before, not after, the logarithm.
    return jax.nn.log_softmax(jnp.where(counts[..., None], logits, 0))


def _label_log_probability(logits, labels, mask, name="labels", wanted=_LOGITS, ranks=(2, 3)):
    """Log-probabilities, that of the label (NaN out of range), labels without those, what counts."""
    logits = _wide("logits", logits, wanted, ranks)
    counts = _counts(mask, logits.shape[:-1])
    labels, in_range = _checked_labels(name, labels, counts, logits.shape[-1])
    log_p = _log_softmax(logits, counts)
    # Gathering by itself would take -1 for the last class.
    log_p_label = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return log_p, jnp.where(in_range, log_p_label, jnp.nan), labels, counts


def _checked_labels(name, labels, counts, num_classes):
    """As int32 with 0 in place of what is out of range, and whether each is in range."""
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{name} must be integers, got {jnp.result_type(labels)}")
    _check_shape(name, labels, counts.shape, "one for each prediction")
    is_known = lambda array: not isinstance(array, Tracer) and getattr(array, "is_fully_addressable", True)
    if is_known(labels) and is_known(counts):
        counted = np.asarray(labels)[np.asarray(counts)]
        if counted.size and (counted.min() < 0 or counted.max() >= num_classes):
            found = f"got {counted.min()} to {counted.max()}"
            raise ValueError(f"{name} must lie in [0, {num_classes}) where they count, {found}")
    labels = jnp.asarray(labels)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # uint8 cannot hold 256
    in_range = (labels >= 0) & (labels < num_classes)
    return jnp.where(in_range, labels, 0).astype(jnp.int32), in_range


def _mean_of_tokens(values, counts):
    """[B] from [B], or from [B, T] the mean over what counts; NaN where nothing does."""
    axes = tuple(range(1, values.ndim))
    number = jnp.sum(counts, axes, dtype=values.dtype)
    total = jnp.sum(jnp.where(counts, values, 0), axes)
    return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)
