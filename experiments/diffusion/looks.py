"""What is looked at in a model: its samples and losses, and how far each attack brings the concept back."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.diffusion import attacks
from experiments.diffusion.bench import JUDGE, Bench, kept
from experiments.diffusion.judge import Seen
from experiments.diffusion.measures import drawn, in_bytes, mean_losses, prompts, still
from experiments.shared.models.diffusion.network import Params
from experiments.shared.models.diffusion.training import Pictures
from experiments.shared.records import Record

SHOWN = 8
"""Samples of each combination of labels that are kept for pictures."""


def seen_in(bench: Bench, images: np.ndarray) -> Seen:
    """What the judge says."""
    return bench.judge.look(kept(bench, JUDGE), images)


def looked_at(bench: Bench, name: str, params: Params) -> Record:
    """Samples and losses; some samples are kept as pictures."""
    task = bench.task
    found = drawn(task, bench.drawer, partial(seen_in, bench), params, bench.scale.samples, bench.seed + 1)
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
    return task.given.taken(task.concepts[0].asked_for(task.given.labels))


def asked_for_concept(bench: Bench, params: Params, amount: int) -> jax.Array:
    """What is asked for in so many samples of the concept, [amount, width]."""
    return bench.drawer.embed(params, prompts(bench.task, bench.task.concepts[0], amount)[0])


def seen_still(bench: Bench, images: np.ndarray) -> float:
    return still(bench.task.concepts[0], seen_in(bench, images))


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
