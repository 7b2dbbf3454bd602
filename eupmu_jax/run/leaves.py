"""The leaves of a model: their names, which of them are trained, and what tells two models apart."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.method.types import PyTree


def by_path(tree: PyTree) -> dict[str, jax.Array]:
    """The leaves by their path, "layer.kernel", whatever containers they are in."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {name_of(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two arrays have the same path: put no '.' into names")
    return named


def name_of(path: tuple) -> str:
    """A key path as "layer.kernel"; of a tree that is one array, "params"."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "params"


def parted(params: PyTree, trainable: Callable[[str], bool] | None) -> tuple[PyTree, PyTree]:
    """The leaves to be trained and the frozen ones, each with None where the other has a leaf.

    Trained is what is floating and whose path `trainable` accepts.
    """
    if not jax.tree.leaves(params):
        raise TypeError("params has no leaves: there is nothing to unlearn")

    def is_trained(path, leaf):
        return jnp.issubdtype(leaf.dtype, jnp.floating) and (trainable is None or trainable(name_of(path)))

    chosen = jax.tree_util.tree_map_with_path(is_trained, params)
    trained = jax.tree.map(lambda leaf, is_chosen: leaf if is_chosen else None, params, chosen)
    if not jax.tree.leaves(trained):
        if trainable is None:
            raise TypeError("params has no floating-point leaf: there is nothing to unlearn")
        some = ", ".join(name_of(path) for path, _ in jax.tree.leaves_with_path(params)[:5])
        raise ValueError(f"trainable accepts no floating-point leaf of params, whose paths are {some}, ...")
    return trained, jax.tree.map(lambda leaf, is_chosen: None if is_chosen else leaf, params, chosen)


def joined(trained: PyTree, frozen: PyTree) -> PyTree:
    """What `parted` took apart."""
    is_none = lambda node: node is None
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=is_none)


def described(tree: PyTree) -> dict[str, str]:
    """Shape and dtype of each leaf by its path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{np.shape(leaf)} {jnp.result_type(leaf)}" for path, leaf in leaves}


def on_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """A leaf in the host's memory; one that several processes hold between them is asked for by all."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(leaf, tiled=True)


def checksum(tree: PyTree) -> int:
    """crc32 of all leaves, one after the other."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        # Row by row, so that of a memory-mapped set only a part is in memory.
        for part in in_parts(on_host(leaf)):
            total = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, total)
    return total


def in_parts(array: np.ndarray, part_bytes: int = 2**26):
    """`array` as pieces of its first axis of about `part_bytes` each."""
    if array.ndim == 0 or array.nbytes <= part_bytes:
        yield array
        return
    rows = max(1, part_bytes * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def rows_not_finite(data: PyTree) -> np.ndarray:
    """The rows of a set in which any floating array holds NaN or infinity."""
    found = np.zeros(0, int)
    for leaf in jax.tree.leaves(data):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        start = 0
        for part in in_parts(np.asarray(leaf)):
            wrong = ~np.isfinite(part.astype(np.float32, copy=False)).reshape(len(part), -1).all(1)
            found, start = np.union1d(found, start + np.flatnonzero(wrong)), start + len(part)
    return found


def check_numeric(tree: PyTree, name: str) -> None:
    """TypeError for a leaf that is no array of numbers."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be an array of numbers, got dtype {dtype}"
            )
