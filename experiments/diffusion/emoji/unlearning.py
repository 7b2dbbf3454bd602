"""How a model of emoji is unlearned: by `eu.unlearn`, a budget for each utility, or by others' methods."""

import time
from typing import Any

import jax
import numpy as np

from experiments.diffusion.bench import keep, kept
from experiments.diffusion.emoji.captions import UNSEEN, tokens_of_kinds
from experiments.diffusion.emoji.erasures import Erasure
from experiments.diffusion.emoji.gallery import Gallery
from experiments.diffusion.emoji.pictures import Emoji
from experiments.diffusion.losses import TO_ANOTHER, make_losses, peer_losses
from experiments.diffusion.methods import METHODS, Peer, Unlearning, budget
from experiments.diffusion.unlearning import Sets, in_batches, run_peer, run_unlearn, seen_by_step
from experiments.shared.models.diffusion.network import Params
from experiments.shared.models.diffusion.training import Pictures
from experiments.shared.records import Record
from experiments.shared.report import ORIGINAL

RANK = 4
MOST_ROWS = 256
"""Pictures of each utility, on all of which its budget is measured."""
OWN_SAMPLES = 64


def to_forget(gallery: Gallery, erasure: Erasure) -> Pictures:
    """The pictures that are captioned so; of what nobody was trained on, the original's own samples."""
    bench, train = gallery.bench, gallery.train
    if (erasure.thing, erasure.style) in UNSEEN:
        kinds = np.full((OWN_SAMPLES, 2), (erasure.thing, erasure.style))
        tokens, original = tokens_of_kinds(kinds), kept(bench, ORIGINAL)
        return Pictures(
            bench.drawer.draw(original, bench.drawer.embed(original, tokens), bench.seed + 6), tokens
        )
    return pictures_of(train, erasure.asked_for(train.tokens))


def pictures_of(emoji: Emoji, rows: np.ndarray) -> Pictures:
    return Pictures(emoji.x[rows], emoji.tokens[rows])


def sets_of(gallery: Gallery, erasure: Erasure, size: int) -> Sets:
    """Retained is what is not forgotten, by utility, in batches of that size."""

    def of(emoji: Emoji, most: int | None = None) -> dict[str, Pictures]:
        found = erasure.utilities(emoji.kinds)
        parts = {name: pictures_of(emoji, np.flatnonzero(rows)[:most]) for name, rows in found.items()}
        return {name: in_batches(part, size) for name, part in parts.items()}

    return Sets(to_forget(gallery, erasure), of(gallery.train, MOST_ROWS), of(gallery.held_out))


def run(
    gallery: Gallery, erasure: Erasure, name: str, method: Unlearning, adapter: dict[str, Any]
) -> tuple[dict[str, Any], Record]:
    """`eu.unlearn`, of the adapter where there is one; all utilities weigh as much together as one would."""
    bench = gallery.bench
    several = len(erasure.utilities(gallery.train.kinds))
    share = bench.scale.batch_size // several
    sets = sets_of(gallery, erasure, share)
    original = kept(bench, ORIGINAL)
    losses = np.array(
        [bench.drawer.losses(original, sets.retain[name]).mean() for name in sorted(sets.retain)]
    )
    losses_fn = make_losses(bench.network, erasure, TO_ANOTHER)
    model, history = run_unlearn(
        bench, name, losses_fn, method.constraint(losses), sets, adapter,
        batch_size=(bench.scale.batch_size, dict.fromkeys(sets.retain, share)),
        initial_multiplier=method.multiplier / several,
    )  # fmt: skip
    return model, seen_by_step(history) | {"utilities": sorted(sets.retain)}


def by_peer(gallery: Gallery, erasure: Erasure, name: str, method: Peer) -> tuple[Params, Record]:
    """On the same pictures; the retained ones are one set."""
    bench, sets = gallery.bench, sets_of(gallery, erasure, 1)
    parts = [sets.forget, *(sets.retain[name] for name in sorted(sets.retain))]
    pictures = Pictures(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    forget, retain = np.split(np.arange(len(pictures.x)), [len(sets.forget.x)])
    losses = peer_losses(bench.network, kept(bench, ORIGINAL), erasure, TO_ANOTHER)
    return run_peer(bench, name, method, losses, pictures, forget, retain)


def unlearned(gallery: Gallery, erasure: Erasure, method: str, name: str) -> Record:
    """One method from the original: what each step saw, and what was promised."""
    start, of = time.process_time(), METHODS[method]
    if isinstance(of, Peer):
        params, record = by_peer(gallery, erasure, name, of)
    else:
        model, record = run(gallery, erasure, name, of, {})
        params = model["params"]
    keep(gallery.bench, name, params)
    return record | {"cpu_seconds": time.process_time() - start}


def adapted(gallery: Gallery, erasure: Erasure) -> Record:
    """A low-rank adapter under budgets, trained without knowing of the others."""
    bench, start = gallery.bench, time.process_time()
    adapter = bench.network.new_adapter(jax.random.key(bench.seed), RANK)
    model, record = run(gallery, erasure, erasure.title, Unlearning(budget), adapter)
    keep(bench, erasure.title, {key: weights._asdict() for key, weights in model["adapter"].items()})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model["adapter"]))
    return record | {"parameters": parameters, "cpu_seconds": time.process_time() - start}
