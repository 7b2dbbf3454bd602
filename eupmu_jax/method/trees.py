"""Questions about pytrees of arrays."""

import jax
import jax.numpy as jnp

from eupmu_jax.method.types import PyTree


def leading_length(tree: PyTree) -> int | None:
    """The length of the leading axis that all leaves share; None where they share none, or an empty one."""
    lengths = {next(iter(jnp.shape(leaf)), 0) for leaf in jax.tree.leaves(tree)}
    return lengths.pop() if len(lengths) == 1 and 0 not in lengths else None
