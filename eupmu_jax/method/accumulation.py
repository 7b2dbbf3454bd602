"""Gradient accumulation: a batch in micro-batches, of which one at a time is in memory."""

import jax
import jax.numpy as jnp

from eupmu_jax.method.losses import (
    Losses,
    LossesFn,
    Mean,
    accumulation_dtype,
    check_losses_fn,
    totals_and_counts,
)
from eupmu_jax.method.trees import leading_length


def accumulated(losses_fn: LossesFn) -> LossesFn:
    r"""The losses of a batch whose leaves have a leading axis of N micro-batches: gradient accumulation.

    .. math:: U = \sum_n \text{total}_n \;/\; \sum_n \text{count}_n, \qquad R_k \text{ likewise}

    from a scan over the micro-batches n, each of which is evaluated again in the backward pass. So
    the weights of the one backward pass see the losses of the whole batch, which a logarithm, a
    lagged measure or a budget needs, and everything else in this package takes the result as it takes
    any losses_fn: the step equals that of the undivided batch.

    What it costs: one forward pass more (about 4/3 of the FLOPs), and in memory the residuals of one
    micro-batch in place of N. The gradient is summed over micro-batches in float32 or wider.

    Args:
      losses_fn: pure function (params, micro_batch) -> `Losses`, of means over equally many examples in
        every micro-batch, or of `Mean` for unequal ones.

    Returns:
      A function (params, batch) -> `Losses` of `Mean`. Every leaf of batch has the shape [N, ...]; on a
      mesh shard the second axis and leave the first whole. For `unlearn`, whose batches are flat,
      reshape inside: ``lambda params, batch: accumulated(losses_fn)(params, {k: batch[k].reshape(N, -1,
      *batch[k].shape[1:]) for k in ("forget", "retain")})``, and give the budget a baseline or take a retain
      set of whole batches.

    Raises:
      TypeError: losses_fn is no function, or returns something else than Losses.
      ValueError: leaves of batch that have no, or not all the same, leading axis.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses(jnp.mean((x - batch) ** 2), jnp.mean((x + batch) ** 2))
      >>> tx = eu.eupmu(eu.accumulated(losses_fn), optax.sgd(0.1), eu.Tolerance(0.01))
      >>> batch, x = jnp.arange(6.0).reshape(3, 2), jnp.array(1.0)  # three micro-batches of two
      >>> updates, state = tx.update(None, tx.init(x), x, batch=batch)
      >>> undivided, seen = losses_fn(x, batch.ravel()), eu.surgery_info(state)
      >>> round(float(undivided.forget), 4), round(float(seen.forget_loss), 4)
      (5.1667, 5.1667)
    """
    check_losses_fn(losses_fn)

    def accumulated_fn(params, batch):
        check_micro_batches(batch)
        narrow = jax.tree.map(lambda leaf: leaf.dtype, params)
        # The scan sums the gradient in the dtype of what it differentiates.
        wide = jax.tree.map(widened, params)

        def evaluate(wide, micro_batch):
            params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), wide, narrow)
            return totals_and_counts(losses_fn(params, micro_batch))

        # A scan keeps iterations apart by itself.
        evaluate = jax.checkpoint(evaluate, prevent_cse=False)
        _, each = jax.lax.scan(lambda _, micro_batch: (None, evaluate(wide, micro_batch)), None, batch)
        totals, counts = jax.tree.map(lambda values: jnp.sum(values, 0), each)
        return Losses(*(Mean(*part) for part in zip(totals, counts, strict=True)))

    return accumulated_fn


def widened(leaf):
    """A floating leaf in float32 or wider; any other as it is."""
    return leaf.astype(accumulation_dtype(leaf)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def check_micro_batches(batch) -> None:
    """ValueError unless all leaves have one leading axis of the same, positive length."""
    if leading_length(batch) is None:
        shapes = {
            jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(batch)
        }
        raise ValueError(
            "every leaf of an accumulated batch must have a leading axis of the same number of "
            f"micro-batches, for instance x.reshape(N, -1, *x.shape[1:]); got shapes {shapes}"
        )
