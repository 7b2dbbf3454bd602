"""R_0: the retain loss of the whole retain set before the first step."""

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.method.losses import LossesFn, Mean
from eupmu_jax.method.types import PyTree
from eupmu_jax.run.batches import RetainSets, in_order


def whole_retain_loss(
    losses_fn: LossesFn, params: PyTree, forget_batch: PyTree, retain: RetainSets, seed: int
) -> np.ndarray:
    """R of all rows, [] or [K], in batches; each Mean by its count, anything else by the rows it has.

    With a set for each utility, utility k is the mean over set k.
    """
    key = jax.random.key(seed)

    @jax.jit
    def sum_and_count(params, forget_batch, rows, index, amounts):
        batch = {"forget": forget_batch, "retain": rows, "key": jax.random.fold_in(key, index)}
        part = losses_fn(params, batch).retain
        if not isinstance(part, Mean):
            part = Mean(part * amounts, amounts)
        # Of a set that is through, the batch is there for the shape alone.
        count = jnp.where(amounts > 0, part.count, 0)
        return jnp.where(amounts > 0, part.total, 0).astype(jnp.float32), count.astype(jnp.float32)

    total, count = np.float64(0), np.float64(0)
    for index, (rows, amounts) in enumerate(in_order(retain)):
        parts = sum_and_count(params, forget_batch, rows, index, amounts if len(amounts) > 1 else amounts[0])
        total, count = total + np.asarray(parts[0], np.float64), count + np.asarray(parts[1], np.float64)
    return np.asarray(total / count, np.float32)
