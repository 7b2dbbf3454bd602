"""Several processes as one run: what they tell each other, and that none waits for one that has ended."""

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eupmu_jax.method.layouts import split
from eupmu_jax.method.types import PyTree

T = TypeVar("T")

# All processes call unlearn equally often, so that they name a run alike.
RUNS = itertools.count()
# A process that hangs is ended so long after another has: in computing or in saving it waits for that one.
GRACE_SECONDS = 30.0


def _store() -> Any:
    """What processes share beside their devices: JAX's key-value store, which is in process 0."""
    return distributed.global_state.client


def _say_that_it_ends() -> None:
    """Before JAX waits at its end for all processes: they may be waiting for this one to come to unlearn."""
    if _store() is not None:
        error = getattr(sys, "last_value", None)
        why = "its program is over" if error is None else f"{type(error).__name__}: {error}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _store().key_value_set(f"eupmu/ended/{distributed.global_state.process_id}", why[:400])


atexit.register(_say_that_it_ends)


class Processes:
    """The processes of a run. Of one alone, everything here is what it would be without.

    Attributes:
      index, count: this process, and how many there are.
      part, parts: which of the parts of a batch this process gives. Processes that hold one model between
        them give the same part.
    """

    def __init__(self, mesh: Mesh | None = None, index: int = 0, parts: tuple[int, ...] = (0,)):
        """`parts` has the part of each process."""
        self.mesh, self.index, self.count = mesh, index, len(parts)
        self.part, self.parts = parts[index], len(set(parts))
        self._first_of_part = [parts.index(part) for part in range(self.parts)]
        self._name, self._number = f"eupmu/{next(RUNS)}", 0
        self._over, self._watch = threading.Event(), None

    def __enter__(self) -> Self:
        if self.count > 1:
            self._watch = threading.Thread(target=self._end_if_left, daemon=True)
            self._watch.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.tell(error)
        self._over.set()
        if self._watch is not None:
            self._watch.join()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the others of an error before anything else is done about it."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise

    def tell(self, error: BaseException) -> None:
        """This process ends: the others will, too, when they ask for it next."""
        if self.count > 1 and not self._over.is_set():
            self._over.set()
            text = f"{type(error).__name__}: {error}"
            _store().key_value_set(f"{self._name}/ended/{self.index}", text[:400])

    def each(self, do: Callable[[], T]) -> list[T]:
        """What `do` gives in each process, as JSON has it; RuntimeError if one has ended instead."""
        value = do()
        if self.count == 1:
            return [value]
        self._number += 1
        found = self._gathered(str(self._number), value)
        # All are here, so that nobody looks at the one before any more.
        if self._number > 1:
            _store().key_value_delete(f"{self._name}/{self._number - 1}/{self.index}")
        assert found is not None
        return found

    def first(self, do: Callable[[], T]) -> T:
        """Every process does it, and what process 0 got counts."""
        return self.each(do)[0]

    def alone(self, do: Callable[[], T]) -> T:
        """Process 0 does it, and all get what it got."""
        return self.first(do if self.index == 0 else lambda: None)  # pyright: ignore[reportReturnType]

    def by_part(self, value: T) -> list[T]:
        """The value of each part of a batch."""
        values = self.each(lambda: value)
        return [values[process] for process in self._first_of_part]

    def agree(self, value: object) -> bool:
        """At the end of a run that failed: whether all processes get here soon, with the same value."""
        if self.count == 1:
            return value is not None
        found = self._gathered("end", value, GRACE_SECONDS)
        return value is not None and found is not None and all(one == value for one in found)

    def check_same(self, **given: Any) -> None:
        """ValueError that names what process 0 was given and another process was not."""
        first, *others = self.each(lambda: given)
        for process, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(
                        f"{name} is {str(value)[:150]} in process 0 and {str(other[name])[:150]} in process "
                        f"{process}: give all processes the same, but for their rows"
                    )

    def _gathered(self, key: str, value: object, seconds: float | None = None) -> list[Any] | None:
        """The value of each process under this key; None if they are not there in time."""
        place = f"{self._name}/{key}/"
        _store().key_value_set(f"{place}{self.index}", json.dumps(value))
        began = time.monotonic()
        while True:
            found = self._at(place)
            missing = [process for process in range(self.count) if process not in found]
            if not missing:
                return [json.loads(found[process]) for process in range(self.count)]
            if seconds is None:
                ended = self._at("eupmu/ended/") | self._at(f"{self._name}/ended/")
                for process in ended.keys() & set(missing):
                    self._over.set()
                    raise RuntimeError(f"process {process} has ended, and so do all: {ended[process]}")
            elif time.monotonic() - began > seconds:
                return None
            # A second at a time, so that Ctrl-C is heard.
            try:
                _store().blocking_key_value_get(f"{place}{missing[0]}", 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def _at(self, place: str) -> dict[int, str]:
        return {int(key.rsplit("/", 1)[1]): value for key, value in _store().key_value_dir_get(place)}

    def _end_if_left(self) -> None:
        """Ends this process if it waits in vain for one that has ended, which nothing else would end."""
        while not self._over.wait(1):
            ended = self._at(f"{self._name}/ended/")
            if ended and not self._over.wait(GRACE_SECONDS):
                process, error = next(iter(ended.items()))
                print(
                    f"process {self.index} ends: process {process} has ended, and for {GRACE_SECONDS:.0f} "
                    f"seconds this one has waited for it in vain. There it was: {error}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def drawn(self, batch_at: Callable[[int], PyTree], steps: range) -> Iterator[PyTree]:
        """Batches of these steps, as far as all processes have them; then the error of the one that has not.

        A step that one process does not take is one in which all others hang.
        """
        if self.count == 1:
            yield from map(batch_at, steps)
            return
        batches, trouble = [], None
        try:
            batches += map(batch_at, steps)
        except Exception as error:
            trouble = error
        found = self.each(lambda: (len(batches), str(trouble)[:400]))
        yield from batches[: min(drawn for drawn, _ in found)]
        if trouble is not None:
            raise trouble
        for process, (drawn, text) in enumerate(found):
            if drawn < len(steps):
                raise RuntimeError(f"process {process} has no more data, and so all end: {text}")

    def warn(self, message: str, stacklevel: int) -> None:
        """A warning, once."""
        if self.index == 0:
            warnings.warn(message, stacklevel=stacklevel)

    def own_seed(self, seed: int) -> int:
        """The seed from which the rows of this part are drawn."""
        if self.parts == 1:
            return seed
        return int(np.random.SeedSequence([seed, self.part]).generate_state(1, np.uint64)[0])

    @property
    def everywhere(self) -> dict[str, Any]:
        """For ``jax.jit``: every process gets all of the outputs."""
        return {} if self.mesh is None else {"out_shardings": NamedSharding(self.mesh, P())}

    def rows(self, batch: PyTree) -> PyTree:
        """The batch of all, of which each process gives its own rows."""
        if self.mesh is None:
            return batch
        return split(batch, P(self.mesh.axis_names[0]), self.mesh)

    def rows_left(self, batch: PyTree, size: int, amounts: list[int]) -> PyTree:
        """Likewise, where each part has so many rows left, at most `size`; 0 everywhere stands for `size`."""
        if self.mesh is None or self.parts == 1:
            return batch
        ways = self.mesh.devices.shape[0] // self.parts
        if size % ways == 0 and (not any(amounts) or all(amount == size for amount in amounts)):
            return self.rows(batch)
        # What is left is no equal share of all: every process gets all of it, without the padding.
        padded = -(-size // ways) * ways
        counts = np.arange(padded) < amounts[self.part]
        fill = lambda leaf: np.resize(leaf, (padded, *np.shape(leaf)[1:]))
        gathered = jax.jit(lambda tree: tree, **self.everywhere)
        found = jax.device_get(gathered(self.rows((jax.tree.map(fill, batch), counts))))
        return jax.tree.map(lambda leaf: leaf[found[1]], found[0])


ALONE = Processes()


def processes_of(mesh: Mesh | None) -> Processes:
    """Those of this job, which share the mesh; ValueError unless it parts the rows among them evenly."""
    if jax.process_count() == 1:
        return Processes()
    if mesh is None:
        raise ValueError(
            f"mesh must be given where there are several processes, here {jax.process_count()}: one of all "
            'devices is jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))'
        )
    places: dict[int, set[int]] = {process: set() for process in range(jax.process_count())}
    for place, devices in enumerate(mesh.devices):
        for device in np.ravel(devices):
            places[device.process_index].add(place)
    parts = sorted({tuple(sorted(held)) for held in places.values()})
    # Each place in one part, all parts of one size: then sorted by their first place they are the batch's.
    if sorted(itertools.chain(*parts)) != list(range(len(mesh.devices))) or len(set(map(len, parts))) > 1:
        raise ValueError(
            f"mesh must part its first axis, {mesh.axis_names[0]!r}, evenly among the processes, or give "
            f"several the same part; here they hold {[sorted(held) for held in places.values()]}"
        )
    return Processes(
        mesh, jax.process_index(), tuple(parts.index(tuple(sorted(held))) for held in places.values())
    )
