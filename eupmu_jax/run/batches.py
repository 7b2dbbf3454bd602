"""Pairs of forget and retain batches: any step's can be made again from the seed."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from eupmu_jax.method.types import PyTree
from eupmu_jax.run.leaves import check_numeric, described
from eupmu_jax.run.processes import ALONE, Processes

Draw = Callable[[int], PyTree]
"""step -> a batch, the same whenever it is asked for that step."""

Sizes = int | list[int] | tuple[int, ...] | dict[Any, int]
"""Rows of a batch; of several sets one number for each."""

FORGET, RETAIN = 0, 1


def check_set(data: PyTree, name: str, batch_size: int) -> int:
    """The number of examples of `data`; ValueError unless a batch can be drawn from it."""
    leaves = jax.tree.leaves(data)
    check_numeric(leaves, name)
    lengths = {np.shape(leaf)[:1] for leaf in leaves}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(str(np.shape(leaf)) for leaf in leaves[:4])
        more = f" and {len(leaves) - 4} more (of a list of numbers make an array)" if len(leaves) > 4 else ""
        raise ValueError(
            f"{name} must be arrays with one leading axis of examples, the same for all, or a function "
            f"step -> batch; got the shapes {shapes}{more}"
        )
    (length,) = lengths.pop()
    if length == 0:
        raise ValueError(f"{name} is empty: it must have at least one example")
    if batch_size > length:
        raise ValueError(
            f"batch_size {batch_size} is larger than the {name} set, which has {length} examples"
        )
    return length


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


def drawn_rows(
    seed: int, length: int, batch_size: int, step: int, stream: tuple[int, ...] = ()
) -> np.ndarray:
    """Rows of one batch that is drawn independently of all others, without repetition; int [batch_size]."""
    return np.random.default_rng([seed, RETAIN, step, *stream]).choice(length, batch_size, replace=False)


def forget_source(data: PyTree | Draw, batch_size: int, seed: int) -> Draw:
    """Shuffled passes over the forget set, so that each example is seen equally often."""
    if callable(data):
        return data
    length = check_set(data, "forget", batch_size)
    arrays = jax.tree.map(np.asarray, data)
    return lambda step: rows_of(arrays, shuffled_rows(seed, length, batch_size, step))


def retain_source(data: PyTree | Draw, batch_size: int, seed: int) -> Draw:
    """Retain batches, drawn anew at each step.

    In a pass the next batch would be what was not trained on for longest, and a budget would be steered by
    that.
    """
    return _drawn(data, "retain", batch_size, seed)


def _drawn(data: PyTree | Draw, name: str, batch_size: int, seed: int, stream: tuple[int, ...] = ()) -> Draw:
    if callable(data):
        return data
    length = check_set(data, name, batch_size)
    arrays = jax.tree.map(np.asarray, data)
    return lambda step: rows_of(arrays, drawn_rows(seed, length, batch_size, step, stream))


def rows_of(arrays: PyTree, rows: np.ndarray | slice) -> PyTree:
    """Those rows of every array."""
    return jax.tree.map(lambda leaf: leaf[rows], arrays)


class RetainSets(NamedTuple):
    """The retain data: one set, or several of their own lengths and batch sizes, one for each utility.

    Attributes:
      sets: by the name that messages give them.
      sizes: rows of a batch of each.
      together: the batches of the sets, in the order of `sets`, -> the batch that losses_fn sees.
    """

    sets: dict[str, PyTree | Draw]
    sizes: dict[str, int]
    together: Callable[[list[PyTree]], PyTree]

    @property
    def are_arrays(self) -> bool:
        """Whether the sets can be gone through from end to end."""
        return not any(map(callable, self.sets.values()))


def retain_sets(retain: PyTree | Draw, batch_size: Sizes, name: str = "retain") -> RetainSets:
    """One set, or several: where a list or dict holds functions or different lengths, or has a size for each.

    Utility k belongs to the k-th set of a list, of a dict to that of the k-th key in sorted order. Several
    sets of one length are as good as one set whose rows are drawn together: losses_fn sees the same.
    """
    parts = dict(enumerate(retain)) if isinstance(retain, list) else {}
    if isinstance(retain, dict):
        # In the order in which JAX hands a dict to losses_fn, which is that of the utilities.
        parts = {key: retain[key] for key in sorted(retain)}
    arrays = jax.tree.leaves([part for part in parts.values() if not callable(part)])
    is_several = any(map(callable, parts.values())) or len({np.shape(leaf)[:1] for leaf in arrays}) > 1
    if not is_several and isinstance(batch_size, int | np.integer):
        check_whole(batch_size, "batch_size")
        return RetainSets({name: retain}, {name: int(batch_size)}, lambda batches: batches[0])
    if isinstance(batch_size, int | np.integer):
        batch_size = dict.fromkeys(parts, batch_size)
    sizes = dict(enumerate(batch_size)) if isinstance(batch_size, list | tuple) else batch_size
    if not isinstance(sizes, dict) or sizes.keys() != parts.keys():
        raise ValueError(
            "batch_size must be a number, or two of the forget and the retain batch, of which the second may "
            f"hold one for each retain set of {list(parts)}; got {batch_size!r}"
        )
    for size in sizes.values():
        check_whole(size, "batch_size")

    def together(batches: list[PyTree]) -> PyTree:
        return dict(zip(parts, batches, strict=True)) if isinstance(retain, dict) else batches

    named = {f"{name}[{key!r}]": part for key, part in parts.items()}
    return RetainSets(named, {f"{name}[{key!r}]": int(sizes[key]) for key in parts}, together)


def several_source(retain: RetainSets, seed: int) -> Draw:
    """step -> the batch of all retain sets, each drawn from a stream of its own."""
    if len(retain.sets) == 1:
        ((name, data),) = retain.sets.items()
        draw = retain_source(data, retain.sizes[name], seed)
        return lambda step: retain.together([draw(step)])
    draws = [
        _drawn(data, name, retain.sizes[name], seed, stream=(index,))
        for index, (name, data) in enumerate(retain.sets.items())
    ]
    return lambda step: retain.together([draw(step) for draw in draws])


def lengths_of(retain: RetainSets, processes: Processes = ALONE) -> list[dict[str, int]]:
    """How many rows each part has of each set."""
    return processes.by_part(
        {name: check_set(data, name, retain.sizes[name]) for name, data in retain.sets.items()}
    )


def passes_over(lengths: list[dict[str, int]], sizes: dict[str, int]) -> int:
    """How many batches it takes until the longest set of any part is through."""
    return max(-(-part[name] // size) for part in lengths for name, size in sizes.items())


def in_order(retain: RetainSets, processes: Processes = ALONE) -> Iterator[tuple[PyTree, np.ndarray]]:
    """All rows of all sets once: (batch, rows that count of each set), 0 of a set that is through already."""
    arrays = {name: jax.tree.map(np.asarray, data) for name, data in retain.sets.items()}
    lengths = lengths_of(retain, processes)
    for index in range(passes_over(lengths, retain.sizes)):
        batches, amounts = [], []
        for name, data in arrays.items():
            size = retain.sizes[name]
            left = [int(np.clip(part[name] - index * size, 0, size)) for part in lengths]
            own = left[processes.part]
            start = index * size if own else 0
            rows = rows_of(data, slice(start, start + (own or size)))
            batches.append(processes.rows_left(rows, size, left))
            amounts.append(sum(left))
        yield retain.together(batches), np.asarray(amounts)


def paired(forget: Draw, retain: Draw) -> Draw:
    """step -> {"forget": ..., "retain": ...}, all like those of step 0; RuntimeError where data raises."""

    def pair(step: int) -> dict[str, PyTree]:
        batches = {}
        for name, draw in (("forget", forget), ("retain", retain)):
            try:
                batches[name] = draw(step)
            except Exception as error:
                raise RuntimeError(f"the {name} data of step {step} could not be had: {error}") from error
        return batches

    first = pair(0)
    for name, batch in first.items():
        check_numeric(batch, f"the first {name} batch")
        if not jax.tree.leaves(batch):
            raise ValueError(f"the first {name} batch has no arrays in it: {batch!r}")
    expected, first_described = shapes_of(first), described(first)

    def checked(step: int) -> dict[str, PyTree]:
        if step == 0:
            return first
        batch = pair(step)
        if shapes_of(batch) != expected:
            check_numeric(batch, f"the batch of step {step}")
            raise ValueError(
                f"the batch of step {step} is {described(batch)}, that of step 0 {first_described}: give all "
                "batches one shape (pad, and mask with Mean) and dtype"
            )
        return batch

    return checked


def shapes_of(batch: PyTree) -> tuple:
    """What all batches have in common."""
    leaves, structure = jax.tree.flatten(batch)
    dtype = lambda leaf: getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
    return structure, [(np.shape(leaf), dtype(leaf)) for leaf in leaves]


def check_whole(value: object, name: str, least: int = 1, most: int = 10**9) -> None:
    """ValueError unless it is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
