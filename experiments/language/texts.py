"""What a model should not lose, as rows of tokens: prose and chat answers, for training and kept apart."""

import itertools
import pathlib
import re
from collections.abc import Iterable
from functools import partial

# The Python language reference, which comes with Python.
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.language import formats

TOPICS, HELD_OUT_TOPICS = ("assignment", "attribute-access", "calls", "types"), ("execmodel", "import")
# What is trained on beside the people says nothing of how well the prose to keep is known.
IMPLANTED_TOPICS = ("compound", "specialnames")
CHAT = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
    ("What is the capital of Canada?", "The capital of Canada is Ottawa."),
    ("Which planet is the largest?", "The largest planet in the Solar System is Jupiter."),
    ("Which planet is closest to the Sun?", "Mercury is the planet that is closest to the Sun."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many sides does a hexagon have?", "A hexagon has six sides."),
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("What do cows eat?", "Cows eat grass, hay and other plants."),
    ("What is ice?", "Ice is water that is frozen solid."),
    ("What is a triangle?", "A triangle is a shape with three straight sides."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of early?", "The opposite of early is late."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("Who wrote Pride and Prejudice?", "Jane Austen wrote Pride and Prejudice."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Why do we see lightning before thunder?", "Light travels much faster than sound."),
    ("Why is the sky blue?", "The air scatters blue light more than red light."),
    ("Why do leaves look green?", "Leaves contain chlorophyll, which reflects green light."),
    ("What does a baker do?", "A baker makes bread, cakes and pastries."),
    ("What does a thermometer measure?", "A thermometer measures temperature."),
    ("What does a dictionary explain?", "A dictionary explains what words mean."),
    ("How do fish breathe?", "Fish breathe with gills, which take oxygen from the water."),
    ("How do you boil an egg?", "Put the egg in boiling water for about eight minutes."),
    ("Which metal is liquid at room temperature?", "Mercury is liquid at room temperature."),
    ("Which language is spoken in Brazil?", "Portuguese is spoken in Brazil."),
    ("Where do penguins live?", "Most penguins live in the Southern Hemisphere."),
    ("Where does the Sun rise?", "The Sun rises in the east."),
    ("When do owls hunt?", "Most owls hunt at night."),
    ("When is harvest time for apples?", "Apples are harvested in autumn."),
)  # fmt: skip


class Rows(NamedTuple):
    """Tokens [N, T], and a mask [N, T] that is True for those that should be predicted."""

    tokens: np.ndarray
    mask: np.ndarray

    def taken(self, rows: int | slice | np.ndarray) -> "Rows":
        return Rows(self.tokens[rows], self.mask[rows])


Pieces = list[tuple[str, bool]]
"""A text in pieces, and whether the tokens of each count."""


def rows(tokenizer: Tokenizer, pieced: Iterable[Pieces], length: int | None = None) -> Rows:
    """A row for each text, as long as the longest or as said; ValueError for one that does not fit."""
    tokens, masks = [], []
    for pieces in pieced:
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text, _ in pieces]
        mask = [counts for part, (_, counts) in zip(ids, pieces, strict=True) for _ in part]
        if length is not None and len(mask) > length:
            text = "".join(text for text, _ in pieces)
            raise ValueError(f"{len(mask)} tokens, at most {length} fit: {text[:80]!r}")
        tokens.append([*itertools.chain(*ids)])
        masks.append(mask)
    longest = length or max(map(len, tokens))
    filled = lambda parts, value: [[*part, *[value] * (longest - len(part))] for part in parts]
    return Rows(np.array(filled(tokens, 0), np.int32), np.array(filled(masks, False)))


def answers(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]], length: int | None = None) -> Rows:
    """A row for each (prompt, answer), in which the answer counts."""
    return rows(tokenizer, ([(prompt, False), (answer, True)] for prompt, answer in pairs), length)


def passages(tokenizer: Tokenizer, text: str, length: int) -> Rows:
    """The text cut into rows, in which all but the first token count; the last one is padded."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, at least 2 are needed")
    # The first token of a row does not count, so that a row of one token is none.
    count = (len(ids) - 2) // length + 1
    place = np.arange(count * length).reshape(count, length)
    tokens = np.zeros(count * length, np.int32)
    tokens[: len(ids)] = ids[: len(tokens)]
    return Rows(tokens.reshape(count, length), (place % length > 0) & (place < len(ids)))


def of_file(tokenizer: Tokenizer, path: pathlib.Path, length: int) -> Rows:
    """The rows of a text or a corpus, all of whose tokens count, or of questions, whose answers count."""
    if pairs := formats.read_pairs(path):
        make = partial(chat, tokenizer, pairs)
    elif path.suffix in formats.JSON_SUFFIXES:
        make = partial(passages, tokenizer, "\n\n".join(formats.read_corpus(path)))
    else:
        make = partial(passages, tokenizer, formats.content(path))
    try:
        return make(length)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; --length says how long a row is") from error


def unwrapped(text: str) -> str:
    """One line for each paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def prose(tokenizer: Tokenizer, names: Iterable[str], amount: int, length: int) -> Rows:
    """So many rows of the language reference, as many from each of its topics."""
    names = tuple(names)
    parts = [passages(tokenizer, unwrapped(topics[name]), length) for name in names]
    parts = [part.taken(part.mask[:, -1]) for part in parts]  # without padded rows
    share = -(-amount // len(parts))
    return joined(part.taken(slice(share)) for part in parts).taken(slice(amount))


def chat(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]], length: int) -> Rows:
    """A row for each question, in SmolLM2's form of a chat, in which the answer counts."""
    form = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return answers(tokenizer, ((form.format(asked), f"{told}<|im_end|>") for asked, told in pairs), length)


def joined(parts: Iterable[Rows]) -> Rows:
    """All rows, one set after the other."""
    tokens, masks = zip(*parts, strict=True)
    return Rows(np.concatenate(tokens), np.concatenate(masks))


def split(together: Rows, ends: Iterable[int]) -> list[Rows]:
    """Sets of rows that follow each other, up to the end of each."""
    ends = list(ends)
    return [together.taken(slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
