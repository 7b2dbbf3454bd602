"""What is measured of each model: every row's compiled step and its time, in JAX and in PyTorch."""

from collections.abc import Callable
from typing import Any

from experiments.benchmarks import peers
from experiments.benchmarks.models import Model, count
from experiments.benchmarks.steps import BUDGET, EXACT, FLOOR, LAGGED, LOOKAHEAD, steps_of
from experiments.benchmarks.timing import (
    block_of_calls,
    block_of_scan,
    compiled,
    interleaved,
    scanned,
    stacked,
    start,
)
from experiments.shared.records import Record

SCANNED = (FLOOR, BUDGET, LAGGED, LOOKAHEAD)
"""The rows that are also run as one call of many steps."""

FEW, FEW_SCANNED = (FLOOR, BUDGET, LAGGED, LOOKAHEAD, EXACT), (FLOOR, LAGGED)
"""Of a model that is slow to compile."""

Report = Callable[[str, float], None]


def measure(model: Model, rounds: int, report: Report) -> Record:
    """Costs by row, and seconds of a step in every round: a call for each ("calls"), one for many ("scan").

    report(what, part) adds up to 1, half of it for compiling.
    """
    trained, frozen = model.init()
    batch, inputs = {"frozen": frozen, **model.batch}, (frozen, stacked(model))
    costs, blocks = {}, {}
    rows, scans = steps_of(model), SCANNED
    if model.is_slow_to_compile:
        rows, scans = {name: rows[name] for name in FEW}, FEW_SCANNED
    programs = len(rows) + len(scans)
    for name, step in rows.items():
        program = compiled(step.step, start(step, trained), batch)
        costs[name] = program.costs
        blocks[f"calls: {name}"] = block_of_calls(program, start(step, trained), batch)
        report(f"compiling {name}", 0.5 / programs)
        if name in scans:
            many = compiled(scanned(step), start(step, trained), inputs)
            blocks[f"scan: {name}"] = block_of_scan(many, start(step, trained), inputs)
            report(f"compiling {name}, many steps", 0.5 / programs)
    blocks |= {f"calls: {name}": block for name, block in peers.blocks_of(model).items()}
    seconds = interleaved(blocks, model.steps, rounds, lambda what, part: report(what, part / 2))
    return {
        "parameters": count(trained),
        "frozen": count(frozen),
        "costs": costs,
        "seconds": {kind: of_kind(seconds, kind) for kind in ("calls", "scan")},
    }


def of_kind(seconds: dict[str, Any], kind: str) -> dict[str, Any]:
    prefix = f"{kind}: "
    return {name.removeprefix(prefix): times for name, times in seconds.items() if name.startswith(prefix)}
