"""What a run is asked to do: how long, in what batches, with which functions."""

import os
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from eupmu_jax.method.types import PyTree
from eupmu_jax.run.batches import Draw, RetainSets, Sizes, check_set, check_whole, retain_sets
from eupmu_jax.run.processes import ALONE, Processes


class Plan(NamedTuple):
    """How long a run is and what a batch is; as it stands in run.json."""

    steps: int
    every: int
    seed: int
    forget_rows: int
    retain_rows: list[int]


def planned(
    steps: int | None,
    epochs: float | None,
    every: int | None,
    batch_size: int | tuple[int, Sizes],
    seed: int,
    forget: PyTree | Draw,
    retain: PyTree | Draw,
    processes: Processes = ALONE,
) -> tuple[Plan, RetainSets]:
    """The plan, and the retain sets with the rows that this process gives to a batch of each."""
    check_whole(seed, "seed", least=0, most=2**63 - 1)
    sizes: Any = batch_size if isinstance(batch_size, tuple | list) else (batch_size, batch_size)
    if len(sizes) != 2:
        raise ValueError(
            f"batch_size must be a number, or two of the forget and the retain batch, got {batch_size!r}"
        )
    check_whole(sizes[0], "batch_size")
    sets = retain_sets(retain, sizes[1])
    steps = _number_of_steps(steps, epochs, forget, int(sizes[0]), processes)
    every = max(1, steps // 10) if every is None else every
    check_whole(every, "every")
    plan = Plan(steps, int(every), int(seed), int(sizes[0]), list(sets.sizes.values()))
    own = {name: max(1, size // processes.parts) for name, size in sets.sizes.items()}
    return plan, sets._replace(sizes=own)


def _number_of_steps(
    steps: int | None, epochs: float | None, forget: PyTree | Draw, batch_size: int, processes: Processes
) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError("give steps or epochs, one of the two")
    if epochs is not None:
        if callable(forget):
            raise ValueError("epochs needs forget as arrays: a function has no known length, give steps")
        is_number = isinstance(epochs, int | float | np.number) and not isinstance(epochs, bool)
        if not is_number or not 0 < epochs < np.inf:
            raise ValueError(f"epochs must be a number > 0, got {epochs!r}")
        length = sum(processes.by_part(check_set(forget, "forget", batch_size // processes.parts)))
        steps = int(np.ceil(epochs * length / batch_size))
    check_whole(steps, "steps")
    assert steps is not None
    return int(steps)


def check_split(
    mesh: Mesh | None, forget: PyTree | Draw, plan: Plan, retain: RetainSets, processes: Processes = ALONE
) -> None:
    """ValueError for batches of arrays that the devices along the mesh's first axis cannot share evenly."""
    if mesh is None:
        return
    axis, devices = next(iter(mesh.shape.items()))
    names, sizes = ["forget", *retain.sets], [plan.forget_rows, *plan.retain_rows]
    data = [forget, *retain.sets.values()]
    arrays = [each for each in zip(names, sizes, data, strict=True) if not callable(each[2])]
    uneven = [size for _, size, _ in arrays if size % devices]
    if uneven:
        raise ValueError(
            f"batch_size must be a multiple of {devices}, the devices along the mesh's axis {axis!r}; got "
            f"{uneven[0]}"
        )
    for name, size, rows in arrays if processes.parts > 1 else ():
        own, length = size // processes.parts, check_set(rows, name, 1)
        if own > length:
            raise ValueError(
                f"batch_size {size} takes {own} rows of each process, but {name} has {length} in process "
                f"{processes.index}: share the rows more evenly, or take a smaller batch"
            )


def kinds(**given: object) -> dict[str, str]:
    """Of arguments that differ from process to process, what must not."""
    kind = lambda value: "None" if value is None else "a function" if callable(value) else "given"
    return {name: kind(value) for name, value in given.items()}


def check_functions(callbacks: object, **functions: object) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function or None, got {function!r}")
    if not isinstance(callbacks, list | tuple) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks must be a list of functions (params, metrics), got {callbacks!r}")


def check_places(folder: object, mesh: object) -> None:
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {type(mesh).__name__}")
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path or None, got {type(folder).__name__}")
