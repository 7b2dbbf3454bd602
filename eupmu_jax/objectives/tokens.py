"""Objectives of every token of long texts and large vocabularies, whose logits do not fit in memory."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eupmu_jax.method.types import PyTree
from eupmu_jax.objectives.masks import what_counts


def by_token(
    objective: Callable[..., Any],
    hidden: ArrayLike,
    head: Callable[[jax.Array], jax.Array],
    *arrays: PyTree,
    mask: ArrayLike | None = None,
    chunk: int = 256,
) -> Any:
    r"""An objective of each token, in chunks: the logits [B, T, V] of all tokens never exist at once.

    .. math:: v_{bt} = \ell\big(\mathrm{head}(h_{bt}), y_{bt}, \dots\big)

    A token is an example of the objective's [n, C] form. The logits of B * chunk tokens exist at a time, and
    are computed again for the gradient, which costs one more product with the head. `masked_mean` of the
    values is their mean over tokens. ``jnp.sum(values, -1, where=mask)`` is the sum over each text; that of
    `gradient_ascent` is the log-probability that `npo` and `simnpo` take.

    Args:
      objective: any that takes ``(logits [n, V], *arrays [n, ...])``, and ``mask=[n]`` where there is one,
        and gives a value for each token, [n]: `cross_entropy`, `unlikelihood`, `kl_to_uniform`, ... A
        function of one's own may return a pytree of arrays [n, ...]. It must take every token for itself.
      hidden: what the head is applied to, floating [B, T, D]. Those at t predict the labels at t: shift the
        labels.
      head: hidden states [n, D] to logits [n, V], closed over its parameters, which get their gradient. Tied
        embeddings [V, D] are ``lambda h: h @ embedding.T``: no transposed copy is made. Their gradient is
        summed over the chunks in their own dtype: close over float32, and cast inside.
      *arrays: labels, targets and what else the objective takes, with leading axes [B, T]; pytrees as well.
      mask: bool [B, T], True for a token that counts; None for all. Where it is False, the hidden states and
        arrays may be anything: neither value nor gradient sees them.
      chunk: tokens of each text at a time, an int >= 1. It need not divide T. A few arrays of the size
        B * chunk * V are the memory it takes.

    Returns:
      [B, T], or the objective's pytree of [B, T, ...]. An objective of this package gives float32 or wider,
      and NaN where the mask is False or a label is out of range.

    Raises:
      TypeError: a chunk that is no int; what the objective raises.
      ValueError: hidden that is not [B, T >= 1, D]; arrays or a mask without its axes [B, T]; a chunk < 1; an
        objective whose values are not [n, ...].

    Example:
      >>> import jax
      >>> from eupmu_jax import objectives
      >>> hidden, embedding = jnp.ones((1, 3, 2)), jnp.zeros((4, 2))
      >>> labels, mask = jnp.array([[3, 0, -100]]), jnp.array([[True, True, False]])
      >>> head = lambda h: h @ embedding.T
      >>> objectives.by_token(objectives.cross_entropy, hidden, head, labels, mask=mask, chunk=2).round(4)
      Array([[1.3863, 1.3863,    nan]], dtype=float32)
    """
    hidden, chunk = jnp.asarray(hidden), operator.index(chunk)
    if hidden.ndim != 3 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must have the shape [B, T, D], T >= 1, got {hidden.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    batch, length = hidden.shape[:2]
    for array in jax.tree.leaves(arrays):
        if jnp.shape(array)[:2] != (batch, length):
            raise ValueError(
                f"arrays must have the leading axes [B, T] of hidden, {(batch, length)}; "
                f"got the shape {jnp.shape(array)}"
            )
    if mask is not None:
        mask = what_counts(mask, (batch, length))
        # A NaN would enter the gradient of the head as 0 * NaN. Not 0: some heads divide by the norm.
        hidden = jnp.where(mask[..., None], hidden, 1)
    number = -(-length // chunk)
    chunk = -(-length // number)  # as even as can be: less is computed only to be cut off

    def cut(x: ArrayLike) -> jax.Array:
        """[B, T, ...] as [number, B, chunk, ...]; what is missing repeats the last token."""
        x = jnp.asarray(x)
        missing = [(0, 0), (0, number * chunk - length), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, missing, mode="edge")
        return jnp.moveaxis(x.reshape(batch, number, chunk, *x.shape[2:]), 1, 0)

    def of_chunk(part: PyTree) -> Any:
        hidden, arrays, mask = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part)
        values = objective(head(hidden), *arrays, **({} if mask is None else {"mask": mask}))
        for each in jax.tree.leaves(values):
            if jnp.shape(each)[:1] != (batch * chunk,):
                raise ValueError(
                    f"objective must return a value for each token, [n] or [n, ...], of logits [n, V]; for "
                    f"n = {batch * chunk} it returned the shape {jnp.shape(each)}"
                )
        return jax.tree.map(lambda x: x.reshape(batch, chunk, *x.shape[1:]), values)

    values = jax.lax.map(jax.checkpoint(of_chunk), jax.tree.map(cut, (hidden, arrays, mask)))
    whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, number * chunk, *x.shape[3:])[:, :length]
    return jax.tree.map(whole, values)
