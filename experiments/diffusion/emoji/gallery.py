"""What all pieces of the study of emoji are made of: how much is done, the network, the pictures."""

import pathlib
from functools import partial
from typing import NamedTuple

from experiments.diffusion.bench import Bench, make_bench
from experiments.diffusion.emoji.captions import STYLES, THINGS, VOCABULARY
from experiments.diffusion.emoji.erasures import ATTRIBUTE, COMBINATION, CONCEPT, STYLE, Erasure
from experiments.diffusion.emoji.pictures import FONT, SIZE, Emoji, drawn
from experiments.diffusion.emoji.words import text_to_image
from experiments.diffusion.measures import make_drawer
from experiments.diffusion.methods import HEADLINE
from experiments.diffusion.tasks import Scale, Task
from experiments.shared.models.diffusion import dit
from experiments.shared.models.diffusion.training import Pictures, Recipe
from experiments.shared.testbed import Progress

WEIGHTS = pathlib.Path(__file__).parents[1] / "results" / "emoji" / "model.safetensors"
"""Of the model before, in half precision."""

METHODS = (HEADLINE, "EUPMU lagged", "constant weight", "redirect alone", "SalUn", "exact surgery")
FEW = (HEADLINE, "constant weight", "redirect alone")

NETWORK = dit.Config(size=SIZE, channels=3, patch=4, width=96, layers=4, heads=4, labels=(1,))
SMALL = dit.Config(size=SIZE, channels=3, patch=12, width=16, layers=2, heads=2, labels=(1,))
ROWS_AT_ONCE = 32


class Amounts(NamedTuple):
    """How much is done.

    Attributes:
      scale: of training, unlearning, samples and attacks, of each thing in each style.
      pictures, held_out: of each thing in each style.
      plan: the methods of each erasure.
    """

    scale: Scale
    network: dit.Config
    pictures: int
    held_out: int
    plan: tuple[tuple[Erasure, tuple[str, ...]], ...]


FULL = Amounts(
    Scale(
        Recipe(4000, batch_size=32, rate=1.5e-3), judge_steps=2000, steps=100, rate=2e-4, batch_size=32,
        adapter_steps=80, adapter_rate=4e-3, samples=6, relearning_steps=20, relearning_rate=5e-4,
        search_steps=60, search_rate=3e-2,
    ),
    NETWORK, pictures=128, held_out=16,
    plan=(
        (CONCEPT, METHODS), (STYLE, FEW), (COMBINATION, (HEADLINE,)), (ATTRIBUTE, FEW[:2]),
    ),
)  # fmt: skip
SMOKE = Amounts(
    FULL.scale._replace(
        recipe=Recipe(100, batch_size=16, memory=0.9), judge_steps=100, steps=10, batch_size=8,
        adapter_steps=5, samples=1, relearning_steps=4, search_steps=4,
    ),
    SMALL, pictures=16, held_out=4, plan=((CONCEPT, (HEADLINE,)),),
)  # fmt: skip


class Gallery(NamedTuple):
    """What all pieces need: the room's bench, the pictures with all that is known of them, and the plan.

    Attributes:
      unseen, judged: pictures of the combinations that nobody is trained on; the judge alone is, on `judged`.
      weights: the file of the model before; None to train it.
    """

    bench: Bench
    train: Emoji
    held_out: Emoji
    unseen: Emoji
    judged: Emoji
    amounts: Amounts
    weights: pathlib.Path | None


def make_gallery(
    path: pathlib.Path,
    seed: int,
    progress: Progress,
    amounts: Amounts,
    weights: pathlib.Path | None,
    font: pathlib.Path = FONT,
) -> Gallery:
    train, held_out = drawn(amounts.pictures, 0, font), drawn(amounts.held_out, 1, font)
    unseen, judged = (
        drawn(amount, seed, font, unseen=True)
        for amount, seed in ((amounts.held_out, 2), (amounts.pictures, 3))
    )
    names = tuple(thing.name for thing in THINGS), STYLES
    make = partial(text_to_image, amounts.network, len(VOCABULARY))
    of = lambda emoji: Pictures(emoji.x, emoji.tokens)
    task = Task("Emoji", names, of(train), of(held_out), (), make, amounts.scale)
    bench = make_bench(task, path, seed, progress)
    drawer = make_drawer(bench.network, train.x.shape[1:], ROWS_AT_ONCE)
    return Gallery(bench._replace(drawer=drawer), train, held_out, unseen, judged, amounts, weights)
