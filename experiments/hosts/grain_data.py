"""Grain: sets that do not fit into memory, of which each row is read from a file when a step asks for it.

pip install grain && python -m experiments.hosts.grain_data
"""

import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import grain  # pyright: ignore[reportMissingImports]
import jax
import numpy as np
import optax
from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
    ArrayRecordWriter,
)

import eupmu_jax as eu
from experiments.hosts import task
from experiments.hosts.optax_alone import fit, initial, of


def write(path: pathlib.Path, rows: dict[str, np.ndarray]) -> None:
    """A record for each example: its pixels, and its label in the last byte."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for x, y in zip(rows["x"], rows["y"], strict=True):
        writer.write(x.tobytes() + bytes([y]))
    writer.close()


def opened(path: pathlib.Path) -> Any:
    """The rows of this process, as a dataset that reads any of them by its number."""
    source = grain.sources.ArrayRecordDataSource(str(path))
    decoded = lambda record: {"x": np.frombuffer(record[:-1], np.float32), "y": np.int32(record[-1])}
    own = slice(jax.process_index(), None, jax.process_count())
    return grain.MapDataset.source(source).map(decoded).slice(own)  # pyright: ignore[reportArgumentType]


def passes(rows: Any, size: int, seed: int) -> Callable[[int], Any]:
    """step -> a batch of endless passes, each in an order of its own: what forget rows come in."""
    batches = rows.shuffle(seed=seed).repeat().batch(size)
    return lambda step: batches[step]


def drawn(rows: Any, size: int, seed: int) -> Callable[[int], Any]:
    """step -> a batch that is drawn independently of all others: what retain rows come in."""

    def batch(step: int) -> Any:
        chosen = np.random.default_rng([seed, step]).choice(len(rows), size, replace=False)
        return jax.tree.map(lambda *parts: np.stack(parts), *(rows[int(row)] for row in chosen))

    return batch


def unlearn(
    folder: pathlib.Path, params: Any, steps: int = 400, callbacks: Sequence[Any] = ()
) -> tuple[Any, eu.History]:
    """From two files. Both functions follow from the step alone, so that a run that was killed goes on."""
    forget, retain = (opened(folder / f"{name}.array_record") for name in ("forget", "retain"))
    size = 64 // jax.process_count()
    losses_fn = lambda params, batch: task.losses(of(params), batch)
    return eu.unlearn(
        losses_fn, params, passes(forget, size, seed=0), drawn(retain, size, seed=0), optax.adam(1e-3),
        eu.Budget(task.TOTAL), steps=steps, callbacks=callbacks, folder=folder / "run",
        # The budget is measured on what fits into memory.
        measured_on=drawn(retain, 1000 // jax.process_count(), seed=1)(0),
    )  # fmt: skip


def main() -> task.Outcome:
    knowing = lambda params, batch: task.knowing(of(params), batch)
    params = fit(knowing, optax.adam(3e-3), initial(), 400)
    before = task.retain_loss(of(params))
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in task.SETS.items():
            write(pathlib.Path(folder) / f"{name}.array_record", rows)
        params, history = unlearn(pathlib.Path(folder), params)
    print(eu.verdict(history.promise))
    return task.report(of(params), before)


if __name__ == "__main__":
    main()
