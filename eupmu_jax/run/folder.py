"""A run's folder: what the run is, its metrics line by line, and checkpoints through Orbax."""

import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, cast

import jax
import numpy as np

from eupmu_jax.method.types import PyTree
from eupmu_jax.run.files import write_whole
from eupmu_jax.run.leaves import by_path, on_host
from eupmu_jax.run.processes import ALONE, Processes
from eupmu_jax.run.promise import Promise

PROGRAM = "crc32 of the step"


class Folder:
    """What a run leaves on disk: run.json, metrics.jsonl, checkpoints/.

    Of several processes the first one writes; checkpoints are written by all.
    """

    def __init__(self, path: str | os.PathLike, run: dict[str, Any], processes: Processes = ALONE):
        """Opens the folder of a run, or makes it; ValueError if another run's is there."""
        try:
            import orbax.checkpoint as ocp
            import safetensors.flax
        except ImportError as error:
            raise ImportError(f'folder needs the extra "run", pip install -e ".[run]": {error}') from error

        self.ocp, self.save_file = ocp, safetensors.flax.save_file
        self.path, self.processes, self.lock = pathlib.Path(path).absolute(), processes, None
        self.metrics = self.path / "metrics.jsonl"
        try:
            processes.alone(lambda: self._open(run))
            options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
            self.manager = ocp.CheckpointManager(self.path / "checkpoints", options=options)
            self.saved = processes.first(self.manager.latest_step) or 0
        except BaseException:
            self._unlock()
            raise

    def _open(self, run: dict[str, Any]) -> None:
        """Makes the folder where there is none, locks it, and looks whose it is."""
        import fcntl  # which Windows has not

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"folder {self.path} cannot be made: {error}") from error
        # The folder itself is what is locked, before anybody looks into it: of two that race one waits for
        # nothing.
        self.lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"folder {self.path} is in use by another run: give a new one") from error
        self._describe(json.loads(json.dumps(run)))

    def _unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def _describe(self, run: dict[str, Any]) -> None:
        """Writes run.json, or compares it with the one that is there."""
        description = self.path / "run.json"
        if not description.exists():
            if any(there.name != "run.json.partial" for there in self.path.iterdir()):
                raise ValueError(f"folder {self.path} is not empty and not that of a run: give a new one")
            write_whole(description, json.dumps(run, indent=2) + "\n")
            return
        saved = read_description(description)
        if saved.get("jax") != run.get("jax") or None in (saved.get(PROGRAM), run.get(PROGRAM)):
            # Another version of JAX, or a mesh, writes the same program in other words.
            saved, run = ({k: v for k, v in one.items() if k not in ("jax", PROGRAM)} for one in (saved, run))
        changed = sorted(key for key in saved.keys() | run.keys() if saved.get(key) != run.get(key))
        if changed:
            changes = "; ".join(
                f"{key}: {short(saved.get(key))} there, {short(run.get(key))} now" for key in changed
            )
            raise ValueError(
                f"folder {self.path} holds a run with other settings ({short(changes, 400)}): give the "
                "same to go on with it, or a new folder"
            )

    def restore(self, like: PyTree) -> tuple[int, PyTree, list[dict[str, Any]]]:
        """(steps done, tree, metrics up to there) of the last checkpoint, or (0, `like`, [])."""
        step = self.saved
        if not step:
            self.processes.alone(lambda: write_whole(self.metrics, ""))
            return 0, like, []
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), by_path(like)
        )
        try:
            restored = self.manager.restore(step, args=self.ocp.args.StandardRestore(target))
        except Exception as error:
            raise ValueError(
                f"checkpoint {self.path / 'checkpoints' / str(step)} cannot be read: {error}\n"
                "Delete that folder to go on from the one before it, or from the start if there is none."
            ) from error
        lines = self.processes.alone(lambda: self._cut_to(step))
        # What Orbax gives may share memory with its own buffers, which a step must not take over.
        leaves = [restored[path].copy() for path in by_path(like)]
        return step, jax.tree.unflatten(jax.tree.structure(like), leaves), lines

    def _cut_to(self, step: int) -> list[dict[str, Any]]:
        """The metrics up to a step; what is in the file after them goes."""
        lines = self._lines_up_to(step)
        if self._is_writable():
            write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def _is_writable(self) -> bool:
        """Not so in an archive, from which a finished run can still be read."""
        return os.access(self.path, os.W_OK)

    def _lines_up_to(self, step: int) -> list[dict[str, Any]]:
        lines = []
        for text in self.metrics.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # written when the run was killed, after the checkpoint
                break
        try:
            kept = [line for line in lines if line["step"] <= step]
            steps = [line["step"] for line in kept if "evaluation" not in line]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{self.metrics} was edited, it is no longer that of a run: restore it"
            ) from error
        if steps != list(range(1, step + 1)):
            raise ValueError(
                f"{self.metrics} does not hold all {step} steps of the checkpoint, each once and in order: "
                "restore the file"
            )
        return kept

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Appends metrics."""
        if self.processes.index > 0:
            return
        try:
            with self.metrics.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise OSError(
                f"{self.metrics} could not be written: {error}. Make room and start again."
            ) from error

    def save_what_all_have(self, step: int, tree: PyTree | None) -> None:
        """Saves a step that is after what was saved last, if all processes have the run as it was then."""
        if self.processes.agree(step if tree is not None and step > self.saved else None):
            self.save(step, tree)

    def save(self, step: int, tree: PyTree) -> None:
        """Starts to save; the last good checkpoint stays until this one is whole."""
        # The metrics first: a checkpoint counts on them even where the power fails.
        if self.processes.index == 0:
            with self.metrics.open("a") as file:
                os.fsync(file.fileno())
        try:
            self.manager.save(step, args=self.ocp.args.StandardSave(by_path(tree)))
        except Exception as error:
            self.saved = step
            # Orbax has logged its own traceback: a second copy of it would bury the message.
            raise OSError(self.failed(step, error)) from None
        self.saved = step

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise OSError(self.failed(self.manager.latest_step(), error)) from None
        finally:
            self.manager.close()
            self._unlock()

    def finish(self, params: PyTree, promise: Promise | None) -> None:
        """What the run came to: params.safetensors, and promise.json where there was a promise."""
        leaves = {}
        for path, leaf in by_path(params).items():
            array = on_host(leaf)
            if self.processes.index == 0:
                leaves[path] = array
        self.processes.alone(lambda: self._write_result(leaves, promise))

    def _write_result(self, leaves: dict[str, np.ndarray], promise: Promise | None) -> None:
        if not self._is_writable() and (self.path / "params.safetensors").exists():
            return
        self.export(leaves)
        if promise is not None:
            text = {name: as_json(value) for name, value in promise._asdict().items()}
            write_whole(self.path / "promise.json", json.dumps(text, indent=2) + "\n")

    def export(self, leaves: dict[str, np.ndarray]) -> None:
        """The parameters as params.safetensors, by path: for other programs, and nothing in it can run."""
        partial = self.path / "params.safetensors.partial"
        try:
            self.save_file(cast(Any, leaves), partial)
            # Else the name could stand for an empty file after a power failure.
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(self.path / "params.safetensors")
        except Exception as error:
            raise OSError(f"{partial} could not be written: {error}. Make room and start again.") from error

    def failed(self, step: int | None, error: Exception) -> str:
        return (
            f"a checkpoint at step {step} could not be written to {self.path}: {error}\n"
            "Make room or mend the folder and start again: the run goes on from its last whole checkpoint."
        )


def as_json(value: Any) -> Any:
    """An array as lists; what JSON has no number for is null."""
    if isinstance(value, list):
        return [as_json(each) for each in value]
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: object, longest: int = 60) -> str:
    """A value as text that fits into a message."""
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def saved_description(folder: str | os.PathLike | None) -> dict[str, Any]:
    """run.json of the run in a folder; {} if there is none."""
    path = None if folder is None else pathlib.Path(folder) / "run.json"
    return {} if path is None or not path.exists() else read_description(path)


def read_description(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the description of a run: {error}") from error
