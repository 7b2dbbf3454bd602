"""The pieces of the study, each finished one a record: models, unlearning, samples, attacks, adapters."""

import pathlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu
from eupmu_jax.method.constraints import Budget, Constraint
from experiments.diffusion import attacks
from experiments.diffusion.judge import Judge, make_judge
from experiments.diffusion.losses import TO_ANOTHER, make_losses, peer_losses
from experiments.diffusion.measures import (
    Drawer,
    Jury,
    drawn,
    in_bytes,
    make_drawer,
    mean_losses,
    prompts,
    still,
)
from experiments.diffusion.methods import METHODS, Peer, Unlearning, adam, budget
from experiments.diffusion.tasks import Concept, Scale, Task
from experiments.shared.loop import make_plan, make_unlearn, make_unlearner
from experiments.shared.models.diffusion.network import Network, Params, make_network
from experiments.shared.models.diffusion.training import Pictures, Train, make_trainer, noised_pictures
from experiments.shared.models.files import load_params, save_params
from experiments.shared.models.lora import Adapter, LowRank, merged
from experiments.shared.records import Record, Records
from experiments.shared.report import ORIGINAL, RETRAIN
from experiments.shared.testbed import Progress

JUDGE = "judge"
RANK, SCALES = 1, (0.5, 1.0, 1.5)
SHOWN = 8
"""Samples of each combination of labels that are kept for pictures."""


class Bench(NamedTuple):
    """The task, the network and what is compiled for it, and the run's folder."""

    task: Task
    folder: pathlib.Path
    seed: int
    progress: Progress
    network: Network
    train: Train
    judge: Judge
    drawer: Drawer
    attacks: attacks.Attacks

    @property
    def scale(self) -> Scale:
        return self.task.scale

    def file(self, kind: str, name: str, suffix: str) -> pathlib.Path:
        return self.folder / kind / file_name(name, suffix)


def file_name(name: str, suffix: str) -> str:
    return name.replace(", ", "-").replace(" → ", "-to-").replace(" ", "-") + suffix


def make_bench(task: Task, folder: pathlib.Path, seed: int, progress: Progress) -> Bench:
    for kind in ("models", "samples"):
        (folder / kind).mkdir(exist_ok=True)
    network, scale = make_network(task.make), task.scale
    shape = task.train.x.shape[1:]
    return Bench(
        task,
        folder,
        seed,
        progress,
        network,
        make_trainer(network, scale.recipe),
        make_judge(task.sizes, shape),
        make_drawer(network, shape),
        attacks.make_attacks(network, scale.relearning_rate, scale.search_rate),
    )


def keep(bench: Bench, name: str, params: Params) -> None:
    save_params(bench.file("models", name, ".safetensors"), params)


def kept(bench: Bench, name: str) -> Params:
    return load_params(bench.file("models", name, ".safetensors"))


# Models before


def trained(bench: Bench, name: str) -> Record:
    """From scratch: on everything, or for the reference on all but the concept."""
    labels, start = bench.task.train.labels, time.process_time()
    concept = bench.task.concepts[0]
    rows = np.flatnonzero(~concept.asked_for(labels) if name == RETRAIN else np.ones(len(labels), bool))
    report = lambda part: bench.progress(f"{name}: training", part * bench.scale.recipe.steps)
    found = bench.train(bench.task.train, rows, bench.seed, report)
    keep(bench, name, found.params)
    parts = np.array_split(found.losses, min(50, len(found.losses)))
    return {"losses": [float(part.mean()) for part in parts], "cpu_seconds": time.process_time() - start}


def trained_judge(bench: Bench) -> Record:
    params = bench.judge.train(bench.task.train, bench.scale.judge_steps, bench.seed)
    keep(bench, JUDGE, params)
    seen = bench.judge.look(params, bench.task.held_out.x)
    return {"right": float((seen.labels == bench.task.held_out.labels).all(-1).mean())}


def jury_of(bench: Bench) -> Jury:
    return Jury(bench.judge, kept(bench, JUDGE))


# Unlearning


class Sets(NamedTuple):
    """What a method is given: pictures to forget, to retain, and like the latter but trained on by nobody."""

    forget: Pictures
    retain: Any
    held_out: Any


HELD_OUT_BATCHES = 32


def sets_of(task: Task, concept: Concept) -> Sets:
    """Whole batches of what is retained, so that a pass over it has one shape."""
    retain, held_out = (
        pictures.taken(~concept.asked_for(pictures.labels)) for pictures in (task.train, task.held_out)
    )
    return Sets(
        task.train.taken(concept.asked_for(task.train.labels)),
        in_batches(retain, task.scale.batch_size),
        in_batches(held_out, HELD_OUT_BATCHES),
    )


def in_batches(pictures: Pictures, size: int) -> Pictures:
    return pictures.taken(slice(len(pictures.x) // size * size))


def by_class(concept: Concept, pictures: Pictures, size: int) -> dict[int, Pictures]:
    """As many pictures of each value of the concept's attribute, in batches of that size."""
    values = pictures.labels[:, concept.attribute]
    each = {int(value): pictures.taken(values == value) for value in np.unique(values)}
    fewest = min(len(part.x) for part in each.values())
    return {value: in_batches(part.taken(slice(fewest)), size) for value, part in each.items()}


def seen_by_step(history: eu.History) -> Record:
    of = lambda key: np.asarray(history.steps[key]).round(6).tolist()
    record: Record = {key: of(key) for key in ("forget_loss", "retain_loss", "multiplier")}
    if history.promise is not None:
        promise = {key: np.asarray(value).tolist() for key, value in history.promise._asdict().items()}
        record |= {"promise": promise, "verdict": eu.verdict(history.promise)}
    return record


def run_unlearn(
    bench: Bench,
    name: str,
    concept: Concept,
    constraint: Constraint,
    sets: Sets,
    **settings: Any,
) -> tuple[dict[str, Any], eu.History]:
    """`eu.unlearn` from the original; `settings` are its own, and those of the losses."""
    scale, original = bench.scale, kept(bench, ORIGINAL)
    adapter = settings.pop("adapter", {})
    steps, rate = (scale.adapter_steps, scale.adapter_rate) if adapter else (scale.steps, scale.rate)
    losses_fn = make_losses(bench.network, concept, settings.pop("redirect", TO_ANOTHER))
    last = 0

    def tell(params, metrics):
        nonlocal last
        bench.progress(f"{name}: unlearning", metrics["step"] - last)
        last = metrics["step"]

    return eu.unlearn(
        losses_fn, {"params": original, "adapter": adapter, "original": original}, sets.forget, sets.retain,
        optax.adam(rate), constraint, steps=steps, seed=bench.seed, callbacks=[tell],
        trainable=lambda path: path.startswith("adapter." if adapter else "params."),
        held_out=sets.held_out if isinstance(constraint, Budget) else None, **settings,
    )  # fmt: skip


def unlearned(bench: Bench, name: str) -> Record:
    """One method from the original: what each step saw, and what was promised."""
    method, start = METHODS[name], time.process_time()
    params, record = (
        by_peer(bench, name, method) if isinstance(method, Peer) else by_unlearn(bench, name, method)
    )
    keep(bench, name, params)
    return record | {"cpu_seconds": time.process_time() - start}


def by_unlearn(bench: Bench, name: str, method: Unlearning) -> tuple[Params, Record]:
    concept, size = bench.task.concepts[0], bench.scale.batch_size
    sets = sets_of(bench.task, concept)
    before = lambda pictures: bench.drawer.losses(kept(bench, ORIGINAL), pictures).mean()
    batch_size, multiplier = (size, size), method.multiplier
    if method.each_class:
        share = max(1, size // (len(np.unique(sets.retain.labels[:, concept.attribute]))))
        parts = by_class(concept, sets.retain, share), by_class(concept, sets.held_out, 1)
        sets = Sets(sets.forget, *parts)
        batch_size = (size, dict.fromkeys(sets.retain, share))
        multiplier = multiplier / len(sets.retain)
        losses = np.array([before(sets.retain[value]) for value in sorted(sets.retain)])
    else:
        losses = before(sets.retain)
    model, history = run_unlearn(
        bench, name, concept, method.constraint(losses), sets, redirect=method.redirect,
        batch_size=batch_size, initial_multiplier=multiplier,
    )  # fmt: skip
    return model["params"], seen_by_step(history)


def by_peer(bench: Bench, name: str, method: Peer) -> tuple[Params, Record]:
    task, concept, scale = bench.task, bench.task.concepts[0], bench.scale
    original = kept(bench, ORIGINAL)
    losses = peer_losses(bench.network, original, concept, TO_ANOTHER)
    unlearner = make_unlearner(
        method.make, losses, optimizer=adam, augmented=lambda key, pictures: noised_pictures(key, pictures)
    )
    gone = concept.asked_for(task.train.labels)
    plan = make_plan(
        np.flatnonzero(gone), np.flatnonzero(~gone), steps=scale.steps, batch_size=scale.batch_size,
        seed=bench.seed, independent=True,
    )  # fmt: skip
    report = lambda part: bench.progress(f"{name}: unlearning", part * scale.steps)
    on_device = Pictures(*map(jnp.asarray, task.train))
    knobs = {"learning_rate": scale.rate, **method.knobs}
    done = make_unlearn(unlearner)(knobs, original, on_device, plan, bench.seed, report)
    return done.params, {key: values.round(6).tolist() for key, values in done.history.items()}


# Adapters


def adapter_name(task: Task, concept: Concept) -> str:
    names = task.names[concept.attribute]
    return f"{names[concept.value]} → {names[concept.instead]}"


def adapted(bench: Bench, concept: Concept) -> Record:
    """A low-rank adapter under a budget, trained without knowing of the others."""
    name, start = adapter_name(bench.task, concept), time.process_time()
    sets, size = sets_of(bench.task, concept), bench.scale.batch_size
    before = bench.drawer.losses(kept(bench, ORIGINAL), sets.retain).mean()
    adapter = bench.network.new_adapter(jax.random.key(bench.seed), RANK)
    model, history = run_unlearn(
        bench, name, concept, budget(before), sets, adapter=adapter, batch_size=size
    )  # fmt: skip
    keep(bench, name, {key: weights._asdict() for key, weights in model["adapter"].items()})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model["adapter"]))
    return seen_by_step(history) | {"parameters": parameters, "cpu_seconds": time.process_time() - start}


def with_adapters(bench: Bench, names: tuple[str, ...], scale: float) -> Params:
    weights = [{key: LowRank(**halves) for key, halves in kept(bench, name).items()} for name in names]
    return merged(kept(bench, ORIGINAL), [Adapter(scale, part) for part in weights])


# What is measured


def looked_at(bench: Bench, name: str, params: Params) -> Record:
    """Samples and losses; some samples are kept as pictures."""
    task = bench.task
    found = drawn(task, bench.drawer, jury_of(bench), params, bench.scale.samples, bench.seed + 1)
    gone, others = found.pop("images")
    of_gone, of_others = prompts(task, task.concepts[0], bench.scale.samples)
    rows = lambda labels: [
        row
        for value in np.unique(labels, axis=0)
        for row in np.flatnonzero((labels == value).all(-1))[:SHOWN]
    ]
    np.savez_compressed(
        bench.file("samples", name, ".npz"),
        gone=in_bytes(gone[rows(of_gone)]),
        others=in_bytes(others[rows(of_others)]),
    )
    return found | {"losses": mean_losses(task, bench.drawer, params)}


def concept_pictures(bench: Bench) -> Pictures:
    task = bench.task
    return task.train.taken(task.concepts[0].asked_for(task.train.labels))


def asked_for_concept(bench: Bench, params: Params, amount: int) -> jax.Array:
    """What is asked for in so many samples of the concept, [amount, width]."""
    return bench.drawer.embed(params, prompts(bench.task, bench.task.concepts[0], amount)[0])


def seen_still(bench: Bench, images: np.ndarray) -> float:
    return still(bench.task.concepts[0], jury_of(bench).look(images))


def relearned(bench: Bench, name: str, params: Params) -> Record:
    """Samples of the concept along a fine-tuning on a few of its pictures."""
    few = concept_pictures(bench).taken(slice(attacks.RELEARNED_FROM))
    steps = attacks.steps_of(few, bench.scale.relearning_steps, attacks.RELEARNED_FROM, bench.seed)
    along = bench.attacks.relearn(params, steps)
    found = []
    for i in range(attacks.LOOKS + 1):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], along)
        asked = asked_for_concept(bench, one, bench.scale.samples // 3)
        found.append(seen_still(bench, bench.drawer.draw(one, asked, bench.seed + 2)))
    return {"still": found}


def searched(bench: Bench, name: str, params: Params) -> Record:
    """Samples of the vector with which the concept's pictures are denoised best, from its label's own on."""
    pictures, scale = concept_pictures(bench), bench.scale
    steps = attacks.steps_of(pictures, scale.search_steps, scale.batch_size, bench.seed)
    along = bench.attacks.search(params, asked_for_concept(bench, params, 1)[0], steps)
    amount = scale.samples // 3
    images = [bench.drawer.draw(params, jnp.tile(asked, (amount, 1)), bench.seed + 3) for asked in along]
    return {"still": [seen_still(bench, part) for part in images]}


def guided_more(bench: Bench, name: str, params: Params) -> Record:
    """Samples of the concept under more guidance."""
    asked = asked_for_concept(bench, params, bench.scale.samples // 3)
    draw = lambda guidance: bench.drawer.draw(params, asked, bench.seed + 4, guidance)
    return {"still": [seen_still(bench, draw(guidance)) for guidance in attacks.GUIDANCES]}


def from_real(bench: Bench, name: str, params: Params) -> Record:
    """The concept's own pictures, noised in part and drawn again."""
    pictures = concept_pictures(bench)
    rows = np.resize(np.arange(len(pictures.x)), bench.scale.samples // 3)
    asked = bench.drawer.embed(params, pictures.labels[rows])
    redraw = lambda start: bench.drawer.redraw(params, pictures.x[rows], asked, bench.seed + 5, start)
    return {"still": [seen_still(bench, redraw(start)) for start in attacks.STARTS]}


Piece = Callable[[Bench, str, Params], Record]
PIECES: dict[str, Piece] = {
    "look": looked_at,
    "relearn": relearned,
    "search": searched,
    "guide": guided_more,
    "redraw": from_real,
}
# Of the progress bar, in steps of unlearning.
OF_PIECES = {"look": 60, "relearn": 60, "search": 60, "guide": 25, "redraw": 25}


def methods_of(task: Task) -> tuple[str, ...]:
    return task.scale.methods or tuple(METHODS)


def peers_of(task: Task) -> list[str]:
    return [name for name in methods_of(task) if isinstance(METHODS[name], Peer)]


def amount(task: Task) -> float:
    """How many steps all pieces take, for the progress bar."""
    scale, methods = task.scale, methods_of(task)
    pieces = (2 + len(methods)) * sum(OF_PIECES.values())
    stacks = len(stacks_of(task)) * OF_PIECES["look"]
    unlearning = len(methods) * scale.steps + len(task.concepts) * scale.adapter_steps
    return 2 * scale.recipe.steps + unlearning + pieces + stacks


def stacks_of(task: Task) -> list[tuple[tuple[str, ...], float]]:
    """Which adapters are added to the original, and at what scale: each alone, and all of them."""
    names = tuple(adapter_name(task, concept) for concept in task.concepts)
    return [((name,), 1.0) for name in names] + [(names, scale) for scale in SCALES]


def stacked(bench: Bench, names: tuple[str, ...], scale: float) -> Record:
    """Samples and losses of the original with these adapters."""
    return looked_at(bench, stack_name(names, scale), with_adapters(bench, names, scale))


def stack_name(names: tuple[str, ...], scale: float) -> str:
    return f"{' + '.join(names)}, scale {scale:g}"


def run_all(bench: Bench, records: Records) -> None:
    """Every piece that has no record yet, one model after the other."""
    task, methods = bench.task, methods_of(bench.task)
    for name in (ORIGINAL, RETRAIN):
        records.get(("train", name), partial(trained, bench, name))
    records.get((JUDGE,), partial(trained_judge, bench))
    for name in (ORIGINAL, RETRAIN, *methods):
        if name in METHODS:
            records.get(("unlearn", name), partial(unlearned, bench, name))
        for kind, piece in PIECES.items():
            records.get((kind, name), lambda piece=piece, name=name: piece(bench, name, kept(bench, name)))
            bench.progress(f"{name}: {kind}", OF_PIECES[kind])
    for concept in task.concepts:
        records.get(("adapter", adapter_name(task, concept)), partial(adapted, bench, concept))
    for names, scale in stacks_of(task):
        records.get(("stack", stack_name(names, scale)), partial(stacked, bench, names, scale))
        bench.progress(f"{stack_name(names, scale)}: look", OF_PIECES["look"])
