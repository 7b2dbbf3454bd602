"""What a model of emoji draws: samples of every thing in every style, what the judge sees, and losses."""

from typing import NamedTuple

import numpy as np

from experiments.diffusion.bench import JUDGE, file_name, kept
from experiments.diffusion.emoji.captions import STYLES, THINGS, tokens_of_kinds
from experiments.diffusion.emoji.gallery import Gallery
from experiments.diffusion.judge import Seen
from experiments.diffusion.measures import in_bytes
from experiments.diffusion.tasks import GUIDANCE
from experiments.shared.models.diffusion.network import Params
from experiments.shared.models.diffusion.training import Pictures
from experiments.shared.records import Record

GUIDANCES = (1.0, 1.5, 2.0, 3.0)
"""At which the agreement of the model before is looked at."""

ALL_KINDS = np.array(
    [(thing, style) for thing in range(len(THINGS)) for style in range(len(STYLES))], np.int32
)


class Looked(NamedTuple):
    """One model's samples, as they were asked for and seen.

    Attributes:
      asked, seen: (thing, style) [N, 2].
      images: [N, SIZE, SIZE, 3], bytes.
      features: of the judge, [N, 64].
      losses: the denoising loss of every held-out picture, [M].
    """

    asked: np.ndarray
    seen: np.ndarray
    images: np.ndarray
    features: np.ndarray
    losses: np.ndarray


def judged(gallery: Gallery, images: np.ndarray) -> Seen:
    return gallery.bench.judge.look(kept(gallery.bench, JUDGE), images)


def samples_of(
    gallery: Gallery, params: Params, tokens: np.ndarray, seed: int, guidance: float = GUIDANCE
) -> np.ndarray:
    """One sample for each caption [N, LENGTH]."""
    drawer = gallery.bench.drawer
    return drawer.draw(params, drawer.embed(params, tokens), gallery.bench.seed + seed, guidance)


def look(gallery: Gallery, name: str, params: Params) -> Record:
    """Samples and losses, kept in a file; the record says how many are as they were asked for."""
    bench = gallery.bench
    asked = np.repeat(ALL_KINDS, bench.scale.samples, 0)
    images = samples_of(gallery, params, tokens_of_kinds(asked), 1)
    seen = judged(gallery, images)
    held_out = gallery.held_out
    losses = bench.drawer.losses(params, Pictures(held_out.x, tokens_of_kinds(held_out.kinds)))
    looked = Looked(asked, seen.labels, in_bytes(images), seen.features, losses)
    np.savez_compressed(bench.file("samples", name, ".npz"), **looked._asdict())
    return {"right": float((seen.labels == asked).all(-1).mean())}


def looked_at(folder, name: str) -> Looked:
    """What `look` kept."""
    return Looked(**np.load(folder / "samples" / file_name(name, ".npz")))


def agreement(gallery: Gallery, params: Params) -> Record:
    """The shares of samples that are of the thing, of the style and of both, at more and more guidance."""
    asked = np.repeat(ALL_KINDS, max(1, gallery.bench.scale.samples // 2), 0)
    found = {}
    for guidance in GUIDANCES:
        seen = judged(gallery, samples_of(gallery, params, tokens_of_kinds(asked), 2, guidance)).labels
        right = seen == asked
        found[f"{guidance:g}"] = [*right.mean(0).tolist(), float(right.all(-1).mean())]
    return {"right": found, "samples": len(asked)}
