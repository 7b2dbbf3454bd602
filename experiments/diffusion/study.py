"""The pieces of the study, each finished one a record: models, unlearning, samples, attacks, adapters."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from experiments.diffusion import ready
from experiments.diffusion.bench import JUDGE, Bench, keep, kept
from experiments.diffusion.looks import PIECES, looked_at
from experiments.diffusion.methods import METHODS, NEAR_AND_FAR, Peer
from experiments.diffusion.tasks import Concept, Task
from experiments.diffusion.unlearning import adapted, adapter_name, unlearned, with_adapters
from experiments.shared.models.diffusion.training import make_trainer
from experiments.shared.records import Key, Record, Records
from experiments.shared.report import ORIGINAL, RETRAIN

SCALES = (0.5, 1.0, 1.5)
"""Of all adapters together."""

OF_PIECES = {"look": 60, "relearn": 60, "search": 60, "guide": 25, "redraw": 25}
"""What each takes of the progress bar, in steps of unlearning."""


def trained(bench: Bench, name: str) -> Record:
    """From scratch, unless it is ready: on everything, or for the reference on all but the concept."""
    if name in bench.task.ready:
        return taken(bench, name)
    labels, start = bench.task.train.labels, time.process_time()
    concept = bench.task.concepts[0]
    rows = np.flatnonzero(~concept.asked_for(labels) if name == RETRAIN else np.ones(len(labels), bool))
    train, steps = bench.train, steps_of(bench.task, name)
    if steps != bench.scale.recipe.steps:
        train = make_trainer(bench.network, dataclasses.replace(bench.scale.recipe, steps=steps))
    report = lambda part: bench.progress(f"{name}: training", part * steps)
    found = train(bench.task.train, rows, bench.seed, report)
    keep(bench, name, found.params)
    parts = np.array_split(found.losses, min(50, len(found.losses)))
    return {"losses": [float(part.mean()) for part in parts], "cpu_seconds": time.process_time() - start}


def steps_of(task: Task, name: str) -> int:
    """Of its training."""
    steps = task.scale.recipe.steps
    return task.scale.reference_steps or steps if name == RETRAIN else steps


def taken(bench: Bench, name: str) -> Record:
    """A model that needs no training."""
    params, record = ready.read(bench.task.ready[name])
    keep(bench, name, params)
    return record


def trained_judge(bench: Bench) -> Record:
    if JUDGE in bench.task.ready:
        return taken(bench, JUDGE)
    params = bench.judge.train(bench.task.train, bench.scale.judge_steps, bench.seed)
    keep(bench, JUDGE, params)
    seen = bench.judge.look(params, bench.task.held_out.x)
    return {"right": float((seen.labels == bench.task.held_out.labels).all(-1).mean())}


def methods_of(task: Task) -> tuple[str, ...]:
    """Near and far are utilities only where it is said what is near."""
    names = task.scale.methods or tuple(METHODS)
    return tuple(name for name in names if task.concepts[0].near or name != NEAR_AND_FAR)


def adapted_of(task: Task) -> tuple[Concept, ...]:
    """The concepts that have adapters, to be used together."""
    return task.concepts if len(task.concepts) > 1 else ()


def peers_of(task: Task) -> list[str]:
    return [name for name in methods_of(task) if isinstance(METHODS[name], Peer)]


def amount(task: Task) -> float:
    """How many steps all pieces take, for the progress bar."""
    scale, methods = task.scale, methods_of(task)
    pieces = (2 + len(methods)) * sum(OF_PIECES.values())
    stacks = len(stacks_of(task)) * OF_PIECES["look"]
    unlearning = len(methods) * scale.steps + len(adapted_of(task)) * scale.adapter_steps
    training = sum(steps_of(task, name) for name in (ORIGINAL, RETRAIN))
    return training + unlearning + pieces + stacks


def stacks_of(task: Task) -> list[tuple[tuple[str, ...], float]]:
    """Which adapters are added to the original, and at what scale: each alone, and all of them."""
    names = tuple(adapter_name(task, concept) for concept in adapted_of(task))
    return [((name,), 1.0) for name in names] + [(names, scale) for scale in SCALES if names]


def stacked(bench: Bench, names: tuple[str, ...], scale: float) -> Record:
    """Samples and losses of the original with these adapters."""
    return looked_at(bench, stack_name(names, scale), with_adapters(bench, names, scale))


def stack_name(names: tuple[str, ...], scale: float) -> str:
    return f"{' + '.join(names)}, scale {scale:g}"


def run_all(bench: Bench, records: Records) -> None:
    """Every piece that has no record yet, one model after the other."""
    task, scale, methods = bench.task, bench.scale, methods_of(bench.task)

    def get(key: Key, make: Callable[[], Record], steps: float = 0, tells: bool = False) -> None:
        """`tells`: what takes these steps says so itself, unless it is done already."""
        is_done = key in records.by_key
        records.get(key, make)
        if is_done or not tells:
            bench.progress(": ".join(reversed(key)), steps)

    for name in (ORIGINAL, RETRAIN):
        tells = name not in task.ready
        get(("train", name), partial(trained, bench, name), steps_of(task, name), tells=tells)
    get((JUDGE,), partial(trained_judge, bench))
    for name in (ORIGINAL, RETRAIN, *methods):
        if name in METHODS:
            get(("unlearn", name), partial(unlearned, bench, name), scale.steps, tells=True)
        for kind, piece in PIECES.items():
            look = lambda piece=piece, name=name: piece(bench, name, kept(bench, name))
            get((kind, name), look, OF_PIECES[kind])
    for concept in adapted_of(task):
        name = adapter_name(task, concept)
        get(("adapter", name), partial(adapted, bench, concept), scale.adapter_steps, tells=True)
    for names, factor in stacks_of(task):
        make = partial(stacked, bench, names, factor)
        get(("stack", stack_name(names, factor)), make, OF_PIECES["look"])
