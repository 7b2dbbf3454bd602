"""The pieces of the study of emoji, each finished one a record: unlearning, samples, attacks, adapters."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.diffusion.bench import JUDGE, keep, kept
from experiments.diffusion.emoji.attacking import ATTACKS
from experiments.diffusion.emoji.erasures import CONCEPT, TOGETHER, Erasure
from experiments.diffusion.emoji.gallery import Amounts, Gallery
from experiments.diffusion.emoji.looking import agreement, look
from experiments.diffusion.emoji.unlearning import adapted, unlearned
from experiments.diffusion.unlearning import with_adapters
from experiments.shared.models.diffusion.training import Pictures
from experiments.shared.models.files import load_params
from experiments.shared.records import Key, Record, Records
from experiments.shared.report import ORIGINAL, RETRAIN

SCALES = (0.5, 1.0, 1.5)
"""Of all adapters together."""

# What each takes of the progress bar, in steps of unlearning.
LOOK, ATTACK, AGREEMENT = 60, 25, 120
TRAINING_STEP = 0.4


def trained(gallery: Gallery, name: str) -> Record:
    """From scratch: on everything, or for the reference on all but the concept; or as it was kept."""
    bench, start = gallery.bench, time.process_time()
    amount = bench.scale.recipe.steps * TRAINING_STEP
    if name == ORIGINAL and gallery.weights is not None:
        # Half of the precision is half of the file.
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), load_params(gallery.weights))
        bench.progress(f"{name}: read", amount)
        keep(bench, name, params)
        return {"losses": [], "cpu_seconds": 0.0}
    kinds = gallery.train.kinds
    gone = CONCEPT.matches(kinds) if name == RETRAIN else np.zeros(len(kinds), bool)
    report = lambda part: bench.progress(f"{name}: training", part * amount)
    found = bench.train(bench.task.train, np.flatnonzero(~gone), bench.seed, report)
    keep(bench, name, found.params)
    parts = np.array_split(found.losses, min(50, len(found.losses)))
    return {"losses": [float(part.mean()) for part in parts], "cpu_seconds": time.process_time() - start}


def trained_judge(gallery: Gallery) -> Record:
    bench = gallery.bench
    # The judge knows the combinations that nobody was trained to draw.
    parts = gallery.train, gallery.judged
    of = lambda field: np.concatenate([getattr(part, field) for part in parts])
    params = bench.judge.train(Pictures(of("x"), of("kinds")), bench.scale.judge_steps, bench.seed)
    keep(bench, JUDGE, params)
    right = bench.judge.look(params, gallery.held_out.x).labels == gallery.held_out.kinds
    of_unseen = bench.judge.look(params, gallery.unseen.x).labels == gallery.unseen.kinds
    return {"right": right.mean(0).tolist(), "right, unseen": of_unseen.mean(0).tolist()}


def name_of(erasure: Erasure, method: str) -> str:
    return f"{erasure.title}, {method}"


def stack_name(names: tuple[str, ...], scale: float) -> str:
    return f"{' + '.join(names)}, scale {scale:g}"


def stacks() -> list[tuple[tuple[str, ...], float]]:
    """Which adapters are added to the original, and at what scale: each alone, and all of them."""
    names = tuple(erasure.title for erasure in TOGETHER)
    return [((name,), 1.0) for name in names] + [(names, scale) for scale in SCALES]


def attacked(amounts: Amounts) -> list[str]:
    """The models that are attacked, which are to have forgotten the concept."""
    methods = dict(amounts.plan)[CONCEPT]
    return [ORIGINAL, *(name_of(CONCEPT, method) for method in methods), RETRAIN]


def amount(amounts: Amounts) -> float:
    """How many steps all pieces take, for the progress bar."""
    scale = amounts.scale
    models = sum(len(methods) for _, methods in amounts.plan)
    looks = 2 + models + len(stacks())
    attacks = len(attacked(amounts)) * len(ATTACKS)
    return (
        2 * scale.recipe.steps * TRAINING_STEP + models * scale.steps + len(TOGETHER) * scale.adapter_steps
        + looks * LOOK + attacks * ATTACK + AGREEMENT
    )  # fmt: skip


def run_all(gallery: Gallery, records: Records) -> None:
    """Every piece that has no record yet: budgets and adapters, then other methods, then the reference."""
    bench, amounts = gallery.bench, gallery.amounts

    def get(key: Key, make: Callable[[], Record], steps: float = 0, tells: bool = False) -> None:
        """`tells`: what takes these steps says so itself, unless it is done already."""
        is_done = key in records.by_key
        records.get(key, make)
        if is_done or not tells:
            bench.progress(": ".join(reversed(key)), steps)

    def see(name: str, params: Callable[[], Any]) -> None:
        get(("look", name), lambda: look(gallery, name, params()), LOOK)

    def attack(name: str) -> None:
        for kind, piece in ATTACKS.items():
            get((kind, name), lambda piece=piece: piece(gallery, kept(bench, name)), ATTACK)

    def train(name: str) -> None:
        get(
            ("train", name),
            partial(trained, gallery, name),
            bench.scale.recipe.steps * TRAINING_STEP,
            tells=True,
        )
        if name == ORIGINAL:
            get((JUDGE,), partial(trained_judge, gallery))
            get(("agreement", name), lambda: agreement(gallery, kept(bench, name)), AGREEMENT)
        see(name, lambda: kept(bench, name))

    def unlearn(erasure: Erasure, methods: tuple[str, ...]) -> None:
        for method in methods:
            name = name_of(erasure, method)
            make = partial(unlearned, gallery, erasure, method, name)
            get(("unlearn", name), make, bench.scale.steps, tells=True)
            see(name, lambda name=name: kept(bench, name))

    train(ORIGINAL)
    for erasure, methods in amounts.plan[:2]:
        unlearn(erasure, methods[:1])
    for erasure in TOGETHER:
        make = partial(adapted, gallery, erasure)
        get(("adapter", erasure.title), make, bench.scale.adapter_steps, tells=True)
    for names, scale in stacks():
        see(stack_name(names, scale), lambda names=names, scale=scale: with_adapters(bench, names, scale))
    original, first, *others, retrained = attacked(amounts)
    for erasure, methods in amounts.plan[2:]:
        unlearn(erasure, methods[:1])
    attack(original)
    attack(first)
    for erasure, methods in amounts.plan:
        unlearn(erasure, methods[1:])
    for name in others:
        attack(name)
    train(retrained)
    attack(retrained)
