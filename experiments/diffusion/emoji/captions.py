"""What emoji are called: things, styles, and captions such as "a grey cat face" as numbers of words."""

from typing import NamedTuple

import numpy as np


class Thing(NamedTuple):
    """An emoji.

    Attributes:
      unicode: its name in Unicode.
      name: what captions call it.
      other_name: what half of the captions in training call it.
    """

    unicode: str
    name: str
    other_name: str


THINGS = (
    Thing("cat face", "cat face", "kitten"),
    Thing("dog face", "dog face", "puppy"),
    Thing("fox face", "fox face", "vixen"),
    Thing("bear face", "bear face", "teddy"),
    Thing("rocket", "rocket", "spaceship"),
    Thing("evergreen tree", "tree", "pine"),
    Thing("red apple", "apple", "fruit"),
    Thing("mushroom", "mushroom", "toadstool"),
)
CAT, DOG, FOX, BEAR, ROCKET, TREE, APPLE, MUSHROOM = range(8)
FACES = (CAT, DOG, FOX, BEAR)

STYLES = ("colour", "grey", "sketch", "negative")
COLOUR, GREY, SKETCH, NEGATIVE = range(4)

UNSEEN = ((CAT, SKETCH), (ROCKET, NEGATIVE))
"""Combinations that nobody is trained on."""

LENGTH = 4
NO_WORD = -1
NOTHING = np.full(LENGTH, NO_WORD, np.int32)
"""The caption that asks for nothing."""


def caption_of(thing: int, style: int, other_name: bool = False) -> str:
    found = THINGS[thing]
    return f"a {STYLES[style]} {found.other_name if other_name else found.name}"


VOCABULARY = tuple(
    sorted(
        {
            word
            for thing in range(len(THINGS))
            for style in range(len(STYLES))
            for other in (False, True)
            for word in caption_of(thing, style, other).split()
        }
    )
)
NUMBERS = {word: number for number, word in enumerate(VOCABULARY)}


def tokens_of(caption: str) -> np.ndarray:
    """The numbers of its words, [LENGTH], int32, -1 where it has fewer; ValueError for an unknown word."""
    words = caption.split()
    if unknown := [word for word in words if word not in NUMBERS]:
        raise ValueError(f"no caption has {', '.join(unknown)}; the words are {', '.join(VOCABULARY)}")
    if len(words) > LENGTH:
        raise ValueError(f'"{caption}" has {len(words)} words: a caption has at most {LENGTH}')
    tokens = NOTHING.copy()
    tokens[: len(words)] = [NUMBERS[word] for word in words]
    return tokens


def tokens_of_kinds(kinds: np.ndarray, other_names: np.ndarray | bool = False) -> np.ndarray:
    """Captions of (thing, style) rows [N, 2], as [N, LENGTH]; `other_names` bool [N], or for all."""
    table = np.array(
        [
            [[tokens_of(caption_of(thing, style, other)) for other in (False, True)] for style in range(4)]
            for thing in range(len(THINGS))
        ]
    )
    return table[kinds[:, 0], kinds[:, 1], np.broadcast_to(np.asarray(other_names, int), len(kinds))]
