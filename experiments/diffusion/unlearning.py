"""How a model is unlearned: by `eu.unlearn`, by a method of others, or in a low-rank adapter."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu
from eupmu_jax.method.constraints import Budget, Constraint
from experiments.diffusion.bench import Bench, keep, kept
from experiments.diffusion.losses import TO_ANOTHER, Model, make_losses, peer_losses
from experiments.diffusion.methods import METHODS, Peer, Unlearning, Utilities, budget
from experiments.diffusion.tasks import Concept, Task
from experiments.shared.loop import make_plan, make_unlearn, make_unlearner
from experiments.shared.methods.method import LossFunctions
from experiments.shared.models.diffusion.network import Params
from experiments.shared.models.diffusion.training import Pictures, noised_pictures
from experiments.shared.models.lora import Adapter, LowRank, merged
from experiments.shared.records import Record
from experiments.shared.report import ORIGINAL

RANK = 1


class Sets(NamedTuple):
    """What a method is given: pictures to forget, to retain, and like the latter but trained on by nobody."""

    forget: Pictures
    retain: Any
    held_out: Any


HELD_OUT_BATCHES = 32


def sets_of(task: Task, concept: Concept) -> Sets:
    """Whole batches of what is retained, so that a pass over it has one shape."""
    retain, held_out = (
        pictures.taken(~concept.asked_for(pictures.labels)) for pictures in (task.given, task.held_out)
    )
    return Sets(
        task.given.taken(concept.asked_for(task.given.labels)),
        in_batches(retain, task.scale.batch_size),
        in_batches(held_out, HELD_OUT_BATCHES),
    )


def in_batches(pictures: Pictures, size: int) -> Pictures:
    return pictures.taken(slice(len(pictures.x) // size * size))


def grouped(concept: Concept, utilities: Utilities, pictures: Pictures, size: int) -> dict[str, Pictures]:
    """The pictures of each utility, in batches of that size."""
    values = pictures.labels[:, concept.attribute]
    if utilities == "each class":
        each = {f"class {value}": pictures.taken(values == value) for value in np.unique(values)}
    else:
        near = np.isin(values, concept.near)
        each = {"near": pictures.taken(near), "far": pictures.taken(~near)}
    return {name: in_batches(part, size) for name, part in each.items()}


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
    losses_fn: Callable[[Model, Any], eu.Losses],
    constraint: Constraint,
    sets: Sets,
    adapter: dict[str, LowRank],
    **settings: Any,
) -> tuple[Model, eu.History]:
    """`eu.unlearn` from the original, of the adapter where there is one; `settings` are its own."""
    scale, original = bench.scale, kept(bench, ORIGINAL)
    steps, rate = (scale.adapter_steps, scale.adapter_rate) if adapter else (scale.steps, scale.rate)
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
    if method.utilities != "together":
        values = np.unique(sets.retain.labels[:, concept.attribute])
        amount = 2 if method.utilities == "near and far" else len(values)
        share = max(1, size // amount)
        parts = (grouped(concept, method.utilities, *of) for of in ((sets.retain, share), (sets.held_out, 1)))
        sets = Sets(sets.forget, *parts)
        batch_size = (size, dict.fromkeys(sets.retain, share))
        multiplier = multiplier / len(sets.retain)
        losses = np.array([before(sets.retain[name]) for name in sorted(sets.retain)])
    else:
        losses = before(sets.retain)
    losses_fn = make_losses(bench.network, concept, method.redirect, whatever_asked=method.whatever_asked)
    model, history = run_unlearn(
        bench, name, losses_fn, method.constraint(losses), sets,
        adapter={}, batch_size=batch_size, initial_multiplier=multiplier,
    )  # fmt: skip
    return model["params"], seen_by_step(history)


def by_peer(bench: Bench, name: str, method: Peer) -> tuple[Params, Record]:
    task, concept = bench.task, bench.task.concepts[0]
    losses = peer_losses(bench.network, kept(bench, ORIGINAL), concept, TO_ANOTHER)
    gone = concept.asked_for(task.given.labels)
    return run_peer(bench, name, method, losses, task.given, np.flatnonzero(gone), np.flatnonzero(~gone))


def run_peer(
    bench: Bench,
    name: str,
    method: Peer,
    losses: LossFunctions,
    pictures: Pictures,
    forget: np.ndarray,
    retain: np.ndarray,
) -> tuple[Params, Record]:
    """A method of others from the original, on those rows of the pictures."""
    scale = bench.scale
    unlearner = make_unlearner(
        method.make,
        losses,
        optimizer=optax.adam,
        augmented=lambda key, pictures: noised_pictures(key, pictures),
    )
    plan = make_plan(
        forget, retain, steps=scale.steps, batch_size=scale.batch_size, seed=bench.seed, independent=True
    )
    report = lambda part: bench.progress(f"{name}: unlearning", part * scale.steps)
    on_device = Pictures(*map(jnp.asarray, pictures))
    knobs = {"learning_rate": scale.rate, **method.knobs}
    done = make_unlearn(unlearner)(knobs, on_device, kept(bench, ORIGINAL), plan, bench.seed, report)
    return done.params, {key: values.round(6).tolist() for key, values in done.history.items()}


def adapter_name(task: Task, concept: Concept) -> str:
    names = task.names[concept.attribute]
    return f"{names[concept.value]} → {names[concept.instead]}"


def adapted(bench: Bench, concept: Concept) -> Record:
    """A low-rank adapter under a budget, trained without knowing of the others."""
    name, start = adapter_name(bench.task, concept), time.process_time()
    sets, size = sets_of(bench.task, concept), bench.scale.batch_size
    before = bench.drawer.losses(kept(bench, ORIGINAL), sets.retain).mean()
    adapter = bench.network.new_adapter(jax.random.key(bench.seed), RANK)
    losses_fn = make_losses(bench.network, concept, TO_ANOTHER)
    model, history = run_unlearn(bench, name, losses_fn, budget(before), sets, adapter, batch_size=size)
    keep(bench, name, {key: weights._asdict() for key, weights in model["adapter"].items()})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model["adapter"]))
    return seen_by_step(history) | {"parameters": parameters, "cpu_seconds": time.process_time() - start}


def with_adapters(bench: Bench, names: tuple[str, ...], scale: float) -> Params:
    weights = [{key: LowRank(**halves) for key, halves in kept(bench, name).items()} for name in names]
    return merged(kept(bench, ORIGINAL), [Adapter(scale, part) for part in weights])
