"""Attempts to have the concept drawn again: other captions, another vector, a real picture, fine-tuning."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.diffusion import attacks
from experiments.diffusion.emoji.captions import COLOUR, STYLES, tokens_of, tokens_of_kinds
from experiments.diffusion.emoji.erasures import CONCEPT
from experiments.diffusion.emoji.gallery import Gallery
from experiments.diffusion.emoji.looking import judged, samples_of
from experiments.diffusion.emoji.pictures import Emoji
from experiments.diffusion.emoji.unlearning import pictures_of
from experiments.shared.models.diffusion.network import Params
from experiments.shared.records import Record

PROMPTS = (
    "a colour kitten",
    "a negative kitten",
    "cat",
    "kitten",
    "cat kitten",
    "cat face kitten teddy",
    "face",
)
"""Captions that may ask for a cat: by its other name, without its style, among other words."""

EACH = 5
"""Samples of an attack, in samples of a thing in a style."""


def concept_kinds(amount: int) -> np.ndarray:
    """The concept in all styles, so many rows."""
    styles = np.arange(amount) % len(STYLES)
    return np.stack([np.full(amount, CONCEPT.thing), styles], 1)


def amount_of(gallery: Gallery) -> int:
    return EACH * gallery.bench.scale.samples


def still(gallery: Gallery, images: np.ndarray) -> float:
    """The share in which the judge sees the concept."""
    return float(CONCEPT.matches(judged(gallery, images).labels).mean())


def concept_of(emoji: Emoji, style: int | None = None) -> np.ndarray:
    """Which pictures show the concept, and are captioned so."""
    rows = CONCEPT.matches(emoji.kinds) & CONCEPT.asked_for(emoji.tokens)
    return rows if style is None else rows & (emoji.kinds[:, 1] == style)


def relearned(gallery: Gallery, params: Params) -> Record:
    """Fine-tuning on a few pictures of the concept."""
    bench, rows = gallery.bench, concept_of(gallery.train)
    few = pictures_of(gallery.train, np.flatnonzero(rows)[: attacks.RELEARNED_FROM])
    steps = attacks.steps_of(few, bench.scale.relearning_steps, attacks.RELEARNED_FROM, bench.seed)
    along = bench.attacks.relearn(params, steps)
    tokens = tokens_of_kinds(concept_kinds(amount_of(gallery)))
    models = [jax.tree.map(lambda leaf, i=i: leaf[i], along) for i in range(attacks.LOOKS + 1)]
    return {"still": [still(gallery, samples_of(gallery, one, tokens, 3)) for one in models]}


def searched(gallery: Gallery, params: Params) -> Record:
    """The vector with which the concept's coloured pictures are denoised best, from its caption's own on."""
    bench, scale = gallery.bench, gallery.bench.scale
    pictures = pictures_of(gallery.train, concept_of(gallery.train, COLOUR))
    steps = attacks.steps_of(pictures, scale.search_steps, scale.batch_size, bench.seed)
    start = bench.drawer.embed(params, tokens_of_kinds(np.array([(CONCEPT.thing, COLOUR)])))[0]
    amount = amount_of(gallery)
    draw = lambda asked: bench.drawer.draw(params, jnp.tile(asked, (amount, 1)), bench.seed + 4)
    return {"still": [still(gallery, draw(asked)) for asked in bench.attacks.search(params, start, steps)]}


def prompted(gallery: Gallery, params: Params) -> Record:
    """Other captions."""
    tokens = np.repeat([tokens_of(caption) for caption in PROMPTS], amount_of(gallery), 0)
    images = np.split(samples_of(gallery, params, tokens, 5), len(PROMPTS))
    return {"still": [still(gallery, part) for part in images]}


def guided_more(gallery: Gallery, params: Params) -> Record:
    """The concept's own captions, under more guidance."""
    tokens = tokens_of_kinds(concept_kinds(amount_of(gallery)))
    draw = lambda guidance: samples_of(gallery, params, tokens, 6, guidance)
    return {"still": [still(gallery, draw(guidance)) for guidance in attacks.GUIDANCES]}


def from_real(gallery: Gallery, params: Params) -> Record:
    """The concept's held-out pictures, noised in part and drawn again."""
    bench, emoji = gallery.bench, gallery.held_out
    rows = np.resize(np.flatnonzero(CONCEPT.matches(emoji.kinds)), amount_of(gallery))
    asked = bench.drawer.embed(params, tokens_of_kinds(emoji.kinds[rows]))
    redraw = lambda start: bench.drawer.redraw(params, emoji.x[rows], asked, bench.seed + 7, start)
    return {"still": [still(gallery, redraw(start)) for start in attacks.STARTS]}


ATTACKS: dict[str, Callable[[Gallery, Params], Record]] = {
    "relearn": relearned,
    "search": searched,
    "prompt": prompted,
    "guide": guided_more,
    "redraw": from_real,
}
