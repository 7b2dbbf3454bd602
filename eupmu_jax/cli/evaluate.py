"""eupmu evaluate: the scores of a model on sets in .npz files."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax import objectives
from eupmu_jax.cli import report
from eupmu_jax.cli.config import Evaluate
from eupmu_jax.cli.exported import in_batches, load_model
from eupmu_jax.cli.objective import masked_mean
from eupmu_jax.evaluation import membership_attack
from eupmu_jax.run.batches import check_set
from eupmu_jax.run.files import write_whole

# Its time grows with their square.
ROWS_FOR_THE_ATTACK = 5000


def load_set(path: pathlib.Path, name: str, apply: Any, params: Any) -> dict[str, np.ndarray]:
    """x, y and perhaps mask of an .npz file that go with the model; ValueError that says what is wrong."""
    try:
        # Pickled objects could run code.
        with np.load(path, allow_pickle=False) as file:
            found = list(file)
            data = {key: file[key] for key in ("x", "y", "mask") if key in file}
    except FileNotFoundError as error:
        raise ValueError(f"--{name} {path}: there is no such file") from error
    except Exception as error:
        raise ValueError(
            f"--{name} {path} is no .npz file of arrays, as numpy.savez(path, x=x, y=y) writes it"
        ) from error
    if not {"x", "y"} <= data.keys():
        raise ValueError(f"--{name} {path} must hold arrays x and y, got {sorted(found)}")
    lengths = {key: len(array) if array.ndim else None for key, array in data.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"--{name} {path}: x, y and mask must have as many rows, got {lengths}")
    try:
        check_set(data, name, batch_size=1)
    except ValueError as error:
        raise ValueError(f"--{name} {path}: {error}") from error
    # A mask may leave such places out.
    if "mask" not in data and np.issubdtype(data["x"].dtype, np.inexact):
        finite = np.isfinite(data["x"]).reshape(len(data["x"]), -1).all(1)
        if not finite.all():
            raise ValueError(
                f"--{name} {path}: x holds NaN or infinity in {np.sum(~finite)} of its {len(finite)} rows, "
                f"of which row {finite.argmin()} is the first: leave these rows out or mask them"
            )
    try:
        logits = jax.eval_shape(apply, params, data["x"][:1])
    except Exception as error:
        raise ValueError(
            f"--{name} {path}: the model does not take x, {data['x'].dtype} {data['x'].shape}: {error}"
        ) from error
    labels, shape = data["y"], (len(data["x"]), *logits.shape[1:-1])
    if labels.shape != shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"--{name} {path}: y must be integers {list(shape)}, got {labels.dtype} {list(labels.shape)}"
        )
    mask = data.get("mask", np.ones(shape, bool))
    if mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"--{name} {path}: mask must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    counted = labels[mask]
    if not counted.size:
        raise ValueError(f"--{name} {path}: mask lets nothing count")
    if counted.min() < 0 or counted.max() >= logits.shape[-1]:
        raise ValueError(
            f"--{name} {path}: y must be from 0 to {logits.shape[-1] - 1}, the model's classes, got "
            f"{counted.min()} to {counted.max()}; mask what does not count"
        )
    return data


def look(logits: jax.Array, rows: Any) -> tuple[jax.Array, jax.Array]:
    """Of each example the cross-entropy in nats, and of each label whether it is the greatest logit."""
    # No class is the greatest where one is NaN or infinite.
    right = jnp.where((logits < jnp.inf).all(-1), logits.argmax(-1) == rows["y"], jnp.nan)
    return objectives.cross_entropy(logits, rows["y"], rows.get("mask")), right


def scores(nats: Any, right: Any, rows: Any) -> dict[str, float]:
    """Mean cross-entropy in nats and accuracy from 0 to 1 of what counts."""
    mean = masked_mean(nats, rows)
    counts = rows.get("mask", np.ones(rows["y"].shape, bool))
    return {"cross_entropy": float(mean.total / mean.count), "accuracy": float(right[counts].mean())}


def make_evaluate(apply: Any) -> Callable[..., dict[str, dict[str, float]]]:
    """(params, sets, attack) -> the scores of each set; compiled once."""
    seen = in_batches(look, apply)
    probabilities = in_batches(lambda logits, rows: jax.nn.softmax(logits), apply)

    def evaluate(params: Any, sets: Any, attack: bool = False) -> dict[str, dict[str, float]]:
        """With attack, also what share of the forget set is taken for unseen, in percent."""
        found = {}
        for name, rows in sets.items():
            nats, right = seen(params, rows)
            found[name] = scores(nats, right, rows)
        if attack and "test" in sets and sets["forget"]["y"].ndim == 1:
            forget, retain, test = (
                (probabilities(params, rows), rows["y"])
                for rows in (first_that_count(sets[name]) for name in ("forget", "retain", "test"))
            )
            attacked = membership_attack(forget, retain, test, ("confidence",))
            found["forget"]["taken for unseen"] = attacked["confidence"]
        return found

    return evaluate


def first_that_count(rows: Any) -> dict[str, np.ndarray]:
    """As many rows as the attack can take."""
    counts = np.flatnonzero(rows.get("mask", np.ones(len(rows["y"]), bool)))[:ROWS_FOR_THE_ATTACK]
    return {key: rows[key][counts] for key in ("x", "y")}


def add_to_evaluation(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Prints models x sets x scores, and adds them to evaluation.json."""
    path = folder / "evaluation.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    write_whole(path, json.dumps(before | found, indent=2) + "\n")
    print(report.as_text(found))


def run_evaluate(config: Evaluate) -> None:
    found = {}
    for name, folder in (("model", config.model), ("reference", config.reference)):
        if folder is None:
            continue
        apply, params = load_model(folder)
        paths = {"forget": config.forget, "retain": config.retain, "test": config.test}
        sets = {kind: load_set(path, kind, apply, params) for kind, path in paths.items() if path}
        found[f"{name} {folder}"] = make_evaluate(apply)(params, sets, attack=True)
    add_to_evaluation(config.model, found)
