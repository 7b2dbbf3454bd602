"""The one owner of where a run is: its parameters, the steps done, and the metrics, in memory and on disk."""

from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from eupmu_jax.method.state import SurgeryInfo, surgery_info
from eupmu_jax.method.types import PyTree
from eupmu_jax.run.folder import Folder


class Best(NamedTuple):
    """The parameters with the highest score so far, None where nothing is scored, and their step."""

    score: jax.Array
    step: jax.Array
    params: PyTree


class Run(NamedTuple):
    """What a checkpoint holds: everything that the rest of a run depends on, but for the data."""

    params: PyTree
    state: PyTree
    best: Best


class Ledger:
    """Run, steps done and metrics are always of one step; or the run is taken, and nothing can be saved.

    `take` hands out the run, whose buffers the next steps take over. `give` puts back what came of it, with a
    record for each step. Whatever ends a run between the two, its folder holds an earlier step whole.
    """

    def __init__(self, run: Run, steps: int, folder: Folder | None):
        """Starts at the folder's last checkpoint, or at `run`."""
        info = surgery_info(run.state)._asdict()
        self.seen = {name: np.zeros((steps, *value.shape), value.dtype) for name, value in info.items()}
        self.evaluations: list[dict[str, Any]] = []
        self.done, self.folder = 0, folder
        self._run: Run | None = run
        if folder is not None:
            self.done, self._run, lines = folder.restore(run)
            for line in lines:
                self._read(line)

    def _read(self, line: dict[str, Any]) -> None:
        if "evaluation" in line:
            self.evaluations.append(line["evaluation"])
            return
        for name, values in self.seen.items():
            values[line["step"] - 1] = line[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ):
        """Data, a score or a user that ends the run: what was done until then is kept."""
        if error is not None and self.folder is not None:
            self.folder.save_what_all_have(self.done, self._run)

    @property
    def run(self) -> Run:
        """The run as it is after `done` steps."""
        assert self._run is not None, "taken"
        return self._run

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """By name, an array with one entry for each step that is done."""
        return {name: values[: self.done] for name, values in self.seen.items()}

    @property
    def chosen(self) -> tuple[PyTree, int]:
        """The parameters that the run returns, the best or the last, and their step."""
        best = self.run.best
        if best.params is not None and best.step > 0:
            return best.params, int(best.step)
        return self.run.params, self.done

    @property
    def stopped(self) -> str | None:
        """Why the run ended before its last step."""
        return self.evaluations[-1].get("stopped") if self.evaluations else None

    @property
    def last_evaluation(self) -> int:
        """The step of the last evaluation; -1 before the first."""
        return self.evaluations[-1]["step"] if self.evaluations else -1

    def take(self) -> Run:
        """The run; until `give` nothing can be saved."""
        run, self._run = self.run, None
        return run

    def give(self, run: Run, infos: list[SurgeryInfo]) -> None:
        """The run after as many more steps as there are records. Waits for them."""
        start, end = self.done, self.done + len(infos)
        for step, info in enumerate(infos, start):
            for name, value in info._asdict().items():
                # A quarter of the time of jax.device_get, which of a small model's step is a fifth.
                self.seen[name][step] = np.asarray(value)
        if self.folder is not None:
            self.folder.write(self._line(step) for step in range(start, end))
        self.done, self._run = end, run

    def _line(self, step: int) -> dict[str, Any]:
        return {"step": step + 1} | {name: values[step].tolist() for name, values in self.seen.items()}

    def summary(self) -> dict[str, Any]:
        """Means of the losses since the last evaluation, the latest of all else; {} before the first step."""
        if self.done == 0:
            return {}
        since = min(max(self.last_evaluation, 0), self.done - 1)
        means = {name: self.seen[name][since : self.done].mean(0) for name in ("forget_loss", "retain_loss")}
        return {name: means.get(name, values[self.done - 1]).tolist() for name, values in self.seen.items()}

    def evaluated(self, metrics: dict[str, Any], best: Best | None) -> None:
        """Adds an evaluation, takes over a new best, and saves."""
        if best is not None:
            self._run = self.run._replace(best=best)
        self.evaluations.append(metrics)
        if self.folder is not None:
            self.folder.write([{"step": self.done, "evaluation": metrics}])
            if self.done:
                self.folder.save(self.done, self.run)
