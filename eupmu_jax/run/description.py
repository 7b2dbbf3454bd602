"""run.json: what must be the same for a run to go on, as far as it can be compared."""

import dataclasses
import re
import zlib
from typing import Any

import jax
import numpy as np
import optax

from eupmu_jax.method.constraints import Budget, Constraint
from eupmu_jax.method.types import Numbers, PyTree
from eupmu_jax.run.batches import RetainSets
from eupmu_jax.run.folder import PROGRAM
from eupmu_jax.run.leaves import checksum, described
from eupmu_jax.run.ledger import Run
from eupmu_jax.run.plan import Plan
from eupmu_jax.run.processes import ALONE, Processes


def description(
    plan: Plan,
    constraint: Constraint,
    initial_multiplier: Numbers,
    forget: PyTree,
    retain: RetainSets,
    measured_on: PyTree,
    model: tuple[PyTree, PyTree],
    run: Run,
    program: str | None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Settings as data; of sets, leaves and the step's program what tells them from others."""
    trained, frozen = model
    data = {"forget": forget, **retain.sets}
    if measured_on is not None:
        data["measured_on"] = measured_on
    texts = processes.by_part({name: data_as_text(rows) for name, rows in data.items()})
    sums = {"crc32 of params": checksum(trained)}
    if jax.tree.leaves(frozen):
        # A frozen base is in no checkpoint: only this says which it was.
        sums["crc32 of frozen params"] = checksum(frozen)
    return {
        **plan._asdict(),
        "constraint": constraint_as_data(constraint),
        "initial_multiplier": plain(initial_multiplier),
        # A batch of two halves is another than one that is drawn from all.
        **(texts[0] if len(texts) == 1 else {name: [part[name] for part in texts] for name in texts[0]}),
        **sums,
        "checkpoint": described(run),
        "jax": jax.__version__,
        # Another loss or optimiser; where functions are in the program, their addresses change from run to
        # run.
        PROGRAM: None if program is None else zlib.crc32(re.sub("0x[0-9a-f]+", "", program).encode()),
    }


def constraint_as_data(constraint: Constraint) -> dict[str, Any]:
    """A constraint as JSON: its type and its fields; of functions their name."""
    fields = {field.name: plain(getattr(constraint, field.name)) for field in dataclasses.fields(constraint)}
    return {"type": type(constraint).__name__, **fields}


def with_saved_baseline(constraint: Constraint, saved: dict[str, Any]) -> Constraint:
    """A budget that was given no baseline, with the one that its run has measured.

    Measured anew, on another machine say, it would differ in the last bit.
    """
    if isinstance(constraint, Budget) and constraint.baseline is None:
        measured = dict(saved.get("constraint") or {}).get("baseline")
        if measured is not None:
            return dataclasses.replace(constraint, baseline=measured)
    return constraint


def data_as_text(data: PyTree) -> dict[str, Any] | str:
    """What tells a set from another: shapes and dtypes, and the checksum of all rows."""
    return "function" if callable(data) else described(data) | {"crc32": checksum(data)}


def plain(value: Any) -> Any:
    """A setting as JSON."""
    if callable(value) or isinstance(value, optax.GradientTransformation):
        return getattr(value, "__qualname__", type(value).__name__)
    return value if isinstance(value, str | bool | None) else np.asarray(value).tolist()
