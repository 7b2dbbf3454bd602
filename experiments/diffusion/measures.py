"""What a model draws and how well it denoises: samples, what the judge says of them, and losses."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.diffusion.judge import Seen, distance
from experiments.diffusion.tasks import GUIDANCE, Concept, Task
from experiments.shared.models.diffusion.network import Network, Params
from experiments.shared.models.diffusion.sampling import guided, partly_noised, sample
from experiments.shared.models.diffusion.schedule import LATEST
from experiments.shared.models.diffusion.training import Pictures, denoising_loss, noised_pictures

ROWS_AT_ONCE, NOISES = 100, 4
NOTHING = -1


class Drawer(NamedTuple):
    """Samples and losses, each compiled once for all models and any number of rows.

    Attributes:
      draw: (params, asked [N, width], seed, guidance) -> images [N, H, W, C].
      redraw: (params, images, asked, seed, start) -> the images noised up to `start` and drawn from there.
      embed: (params, labels [N, attributes]) -> asked [N, width].
      losses: (params, pictures) -> the loss of each picture, [N], at the same noises for all models.
    """

    draw: Callable[..., np.ndarray]
    redraw: Callable[..., np.ndarray]
    embed: Callable[[Params, np.ndarray], jax.Array]
    losses: Callable[[Params, Pictures], np.ndarray]


def in_parts(function: Callable[..., Any], *arrays: Any, at_once: int = ROWS_AT_ONCE) -> np.ndarray:
    """function(number of the part, *parts) of so many rows at a time; the last ones are filled up."""
    amount, found = len(arrays[0]), []
    for index, start in enumerate(range(0, amount, at_once)):
        rows = np.resize(np.arange(start, min(start + at_once, amount)), at_once)
        found.append(np.asarray(function(index, *(array[rows] for array in arrays))))
    return np.concatenate(found)[:amount]


def make_drawer(
    network: Network,
    shape: tuple[int, ...],
    at_once: int = ROWS_AT_ONCE,
    guidance: float = GUIDANCE,
) -> Drawer:
    """`shape` is that of one image; so many are drawn at once, with `guidance` unless another one is said."""
    usual = guidance

    @jax.jit
    def from_noised(params, key, x, asked, guidance, start):
        return sample(guided(network, params, asked, guidance), key, x, start=start)

    noise = jax.jit(lambda key: jax.random.normal(key, (at_once, *shape)))
    partly = jax.jit(partly_noised)
    key_of = lambda seed, index: jax.random.fold_in(jax.random.key(seed), index)

    def draw(params: Params, asked: jax.Array, seed: int, guidance: float = usual) -> np.ndarray:
        def part(index, asked):
            key = key_of(seed, index)
            return from_noised(params, key, noise(key), asked, jnp.float32(guidance), jnp.float32(LATEST))

        return in_parts(part, asked, at_once=at_once)

    def redraw(params: Params, images: np.ndarray, asked: jax.Array, seed: int, start: float) -> np.ndarray:
        def part(index, images, asked):
            key = key_of(seed, index)
            x = partly(key, images, jnp.float32(start))
            return from_noised(params, key, x, asked, jnp.float32(usual), jnp.float32(start))

        return in_parts(part, images, asked, at_once=at_once)

    @jax.jit
    def some_losses(params, key, pictures):
        of = lambda key: denoising_loss(network, params, noised_pictures(key, pictures))
        return jax.lax.map(of, jax.random.split(key, NOISES)).mean(0)

    def losses(params: Params, pictures: Pictures) -> np.ndarray:
        part = lambda index, x, labels: some_losses(params, key_of(0, index), Pictures(x, labels))
        return in_parts(part, *pictures, at_once=at_once)

    return Drawer(draw, redraw, jax.jit(network.embed), losses)


def prompts(task: Task, concept: Concept, amount: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the concept, so many, and of what is kept, three times as many; all equally often."""
    known = np.unique(task.train.labels, axis=0)
    asked = concept.asked_for(known)
    of = lambda rows, amount: np.resize(rows, (amount, known.shape[1]))
    return of(known[asked], amount), of(known[~asked], 3 * amount)


def still(concept: Concept, seen: Seen) -> float:
    """The share of images in which the judge sees the concept."""
    return float(concept.asked_for(seen.labels).mean())


def shares(task: Task, concept: Concept, seen: Seen) -> list[float]:
    """Of each value of the concept's attribute, the share of images in which the judge sees it."""
    counts = np.bincount(seen.labels[:, concept.attribute], minlength=task.sizes[concept.attribute])
    return (counts / len(seen.labels)).tolist()


def kept_pictures(task: Task) -> Pictures:
    """All real pictures without the concept that is forgotten."""
    both = Pictures(*(np.concatenate(arrays) for arrays in zip(task.given, task.held_out, strict=True)))
    return both.taken(~task.concepts[0].asked_for(both.labels))


def right(seen: Seen, labels: np.ndarray, without: Sequence[Concept]) -> float:
    """The share of images with all the labels that were asked for, of those without the concepts."""
    counts = ~np.any([concept.asked_for(labels) for concept in without], 0)
    return float((seen.labels == labels).all(-1)[counts].mean())


def right_by_nearness(concept: Concept, seen: Seen, labels: np.ndarray) -> dict[str, float]:
    """Of what is near the concept and of what is not, where it says what is near."""
    near = np.isin(labels[:, concept.attribute], concept.near)
    correct = (seen.labels == labels).all(-1)
    parts = {"right, near": correct[near], "right, far": correct[~near]} if concept.near else {}
    return {name: float(part.mean()) for name, part in parts.items()}


def drawn(
    task: Task,
    drawer: Drawer,
    look: Callable[[np.ndarray], Seen],
    params: Params,
    amount: int,
    seed: int,
) -> dict[str, Any]:
    """The images and scores of one model; `look` is the judge's.

    Returns:
      "still": by name of each concept, the share of its samples in which the judge sees it; "shares" of the
      values in samples of the first; "nothing", the share of the first in samples of nothing; "right", of the
      kept samples, "right of none", of those without any of the concepts, and "right, near" and "right, far";
      "distance" of their features to real ones; "images", those of the first concept and of what is kept.
    """
    concept = task.concepts[0]
    gone, kept = prompts(task, concept, amount)
    labels = np.concatenate([gone, kept, np.full_like(gone, NOTHING)])
    images = drawer.draw(params, drawer.embed(params, labels), seed)
    seen, ends = look(images), [len(gone), len(gone) + len(kept)]
    of_gone, of_kept, of_nothing = (
        Seen(*parts) for parts in zip(*(np.split(part, ends) for part in seen), strict=True)
    )
    asked = labels[: ends[1]]
    of_concept = {}
    for one in task.concepts:
        rows = np.flatnonzero(one.asked_for(asked))
        of_concept[task.name(one)] = still(one, Seen(seen.labels[rows], seen.features[rows]))
    real = look(kept_pictures(task).x).features
    return {
        "still": of_concept,
        "shares": shares(task, concept, of_gone),
        "nothing": still(concept, of_nothing),
        "right": right(of_kept, kept, [concept]),
        "right of none": right(of_kept, kept, task.concepts),
        **right_by_nearness(concept, of_kept, kept),
        "distance": distance(of_kept.features, real),
        "images": (images[: ends[0]], images[ends[0] : ends[1]]),
    }


def in_bytes(images: np.ndarray) -> np.ndarray:
    """[-1, 1] as 0 to 255."""
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def mean_losses(task: Task, drawer: Drawer, params: Params) -> dict[str, float]:
    """The denoising loss of what is kept, in training and held-out pictures, and of the concept."""
    concept = task.concepts[0]
    found = {}
    for name, pictures in (("train", task.given), ("held out", task.held_out)):
        each, gone = drawer.losses(params, pictures), concept.asked_for(pictures.labels)
        found |= {f"kept, {name}": float(each[~gone].mean()), f"gone, {name}": float(each[gone].mean())}
    return found
