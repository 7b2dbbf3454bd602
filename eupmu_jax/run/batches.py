"""Pairs of forget and retain batches: any step's can be made again from the seed."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORGET, RETAIN = 0, 1


def check_set(data: Any, name: str, batch_size: int) -> int:
    """The number of examples of `data`; ValueError unless a batch can be drawn from it."""
    leaves = jax.tree.leaves(data)
    check_numeric(leaves, name)
    lengths = {np.shape(leaf)[:1] for leaf in leaves}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"{name} must be arrays with one leading axis of examples, the same for all, or a function "
            f"step -> batch; got shapes {[np.shape(leaf) for leaf in leaves]}"
        )
    (length,) = lengths.pop()
    if length == 0:
        raise ValueError(f"{name} is empty: there is nothing to {name}")
    if batch_size > length:
        raise ValueError(
            f"batch_size {batch_size} is larger than the {name} set, which has {length} examples"
        )
    return length


def check_numeric(tree: Any, name: str) -> None:
    """TypeError for a leaf that is no array of numbers."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be an array of numbers, got dtype {dtype}"
            )


def shuffled_rows(seed: int, length: int, batch_size: int, step: int) -> np.ndarray:
    """Rows of one batch from endless passes, each in an order of its own; int [batch_size]."""
    first = step * batch_size
    passes = range(first // length, (first + batch_size - 1) // length + 1)
    order = np.concatenate([order_of_pass(seed, length, i) for i in passes])
    return order[first % length :][:batch_size]


@lru_cache(maxsize=2)
def order_of_pass(seed: int, length: int, index: int) -> np.ndarray:
    """A permutation, kept while its pass lasts."""
    return np.random.default_rng([seed, FORGET, index]).permutation(length)


def drawn_rows(seed: int, length: int, batch_size: int, step: int) -> np.ndarray:
    """Rows of one batch that is drawn independently of all others, without repetition; int [batch_size]."""
    return np.random.default_rng([seed, RETAIN, step]).choice(length, batch_size, replace=False)


def source(data: Any, name: str, batch_size: int, seed: int) -> Callable[[int], Any]:
    """step -> batch: the function that was given, or rows of the arrays that were.

    Forget examples come in shuffled passes, so that each is seen equally often. Retain batches are
    drawn anew at each step: in a pass the next batch would be what was not trained on for longest,
    and a budget would be steered by that.
    """
    if callable(data):
        return data
    length = check_set(data, name, batch_size)
    arrays = jax.tree.map(np.asarray, data)
    rows = shuffled_rows if name == "forget" else drawn_rows

    def batch(step: int) -> Any:
        chosen = rows(seed, length, batch_size, step)
        return jax.tree.map(lambda leaf: leaf[chosen], arrays)

    return batch


def described(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf by its path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{np.shape(leaf)} {jnp.result_type(leaf)}" for path, leaf in leaves}


class Stack(NamedTuple):
    """Batches of consecutive steps along a leading axis, how many, and why they end early, if they do."""

    rows: dict[str, Any] | None
    amount: int
    trouble: Exception | None


def paired(forget: Callable[[int], Any], retain: Callable[[int], Any]) -> Callable[[int, int], Stack]:
    """(start, stop) -> the batches of steps start to stop - 1, all like the first."""

    def pair(step: int) -> dict[str, Any]:
        batches = {}
        for name, batch in (("forget", forget), ("retain", retain)):
            try:
                batches[name] = batch(step)
            except Exception as error:
                raise RuntimeError(f"the {name} data of step {step} could not be had: {error}") from error
        return batches

    first = pair(0)
    for name, batch in first.items():
        check_numeric(batch, f"the first {name} batch")
        if not jax.tree.leaves(batch):
            raise ValueError(f"the first {name} batch has no arrays in it: {batch!r}")
    shapes = described(first)

    def checked(step: int) -> dict[str, Any]:
        batch = pair(step)
        check_numeric(batch, f"the batch of step {step}")
        if (got := described(batch)) != shapes:
            raise ValueError(
                f"the batch of step {step} is {got}, that of step 0 {shapes}: give all batches one shape "
                "(pad, and mask with Mean) and dtype"
            )
        return batch

    def stacked(start: int, stop: int) -> Stack:
        each, trouble = [], None
        try:
            for step in range(start, stop):
                each.append(checked(step))
        except (RuntimeError, TypeError, ValueError) as error:
            trouble = error
        rows = jax.tree.map(lambda *leaves: np.stack(leaves), *each) if each else None
        return Stack(rows, len(each), trouble)

    return stacked
