"""What is to be forgotten: a thing, a style, or a thing in one style, by other words in its captions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.diffusion.emoji.captions import (
    APPLE,
    CAT,
    COLOUR,
    DOG,
    FACES,
    MUSHROOM,
    NEGATIVE,
    NO_WORD,
    NUMBERS,
    SKETCH,
    STYLES,
    THINGS,
    VOCABULARY,
)

REST = "all others"


class Erasure(NamedTuple):
    """Captions with all of the words ask for what the others in their places say.

    Attributes:
      title: of tables.
      thing, style: what is forgotten; None stands for any.
      words, instead: of captions, of equal number.
      drawn: the thing and the style that are drawn in its place; None: the one that was asked for.
    """

    title: str
    thing: int | None
    style: int | None
    words: tuple[str, ...]
    instead: tuple[str, ...]
    drawn: tuple[int | None, int | None]

    def matches(self, kinds: np.ndarray) -> np.ndarray:
        """Which (thing, style) rows are forgotten, bool [N]."""
        wanted = (self.thing, self.style)
        columns = [
            column == value for column, value in zip(kinds.T, wanted, strict=True) if value is not None
        ]
        return np.all(columns, 0)

    def becomes(self, kinds: np.ndarray) -> np.ndarray:
        """What is to be drawn for (thing, style) rows that are forgotten, [N, 2]."""
        values = [
            kinds[:, i] if value is None else np.full(len(kinds), value) for i, value in enumerate(self.drawn)
        ]
        return np.stack(values, 1)

    def asked_for(self, tokens: np.ndarray) -> np.ndarray:
        """Which captions [N, LENGTH] have all of the words, bool [N]."""
        return np.all([(tokens == NUMBERS[word]).any(-1) for word in self.words], 0)

    def redirected(self, labels: Any) -> jax.Array:
        """Captions [N, LENGTH], the labels of pictures, with the other words."""
        table = np.arange(len(VOCABULARY), dtype=np.int32)
        table[[NUMBERS[word] for word in self.words]] = [NUMBERS[word] for word in self.instead]
        return jnp.where(labels == NO_WORD, NO_WORD, jnp.asarray(table)[labels])

    def utilities(self, kinds: np.ndarray) -> dict[str, np.ndarray]:
        """All that is kept, in parts that each have a budget: bool [N] by name.

        Of a thing: its neighbours, faces like it, and all others. Of a style: every other one. Of a thing in
        one style: the thing in other styles, the style on other things, and all others.
        """
        kept, (things, styles) = ~self.matches(kinds), kinds.T
        if self.style is None:
            near = kept & np.isin(things, FACES)
            return {"near": near, REST: kept & ~near}
        if self.thing is None:
            return {name: kept & (styles == i) for i, name in enumerate(STYLES) if i != self.style}
        thing, style = kept & (things == self.thing), kept & (styles == self.style)
        return {"same thing": thing, "same style": style, REST: kept & ~thing & ~style}


def of_thing(thing: int, instead: int) -> Erasure:
    """Its name as captions say it first; the names differ in as many words as each other."""
    names = THINGS[thing].name, THINGS[instead].name
    pairs = [pair for pair in zip(*(name.split() for name in names), strict=True) if pair[0] != pair[1]]
    words, others = zip(*pairs, strict=True)
    return Erasure(" → ".join(names), thing, None, words, others, (instead, None))


def of_style(style: int, instead: int) -> Erasure:
    names = STYLES[style], STYLES[instead]
    return Erasure(" → ".join(names), None, style, names[:1], names[1:], (None, instead))


def of_pair(thing: int, style: int, instead: int) -> Erasure:
    """A thing in one style: another thing in that style."""
    alone, name = of_thing(thing, instead), STYLES[style]
    return alone._replace(
        title=f"{name} {alone.title}", style=style, words=(name, *alone.words), instead=(name, *alone.instead)
    )


CONCEPT = of_thing(CAT, DOG)
STYLE = of_style(SKETCH, COLOUR)
ATTRIBUTE = of_style(NEGATIVE, COLOUR)
COMBINATION = of_pair(CAT, SKETCH, DOG)
TOGETHER = (CONCEPT, of_thing(APPLE, MUSHROOM), STYLE)
"""Forgotten in an adapter each, which are trained apart."""
