"""The files of TOFU, MUSE and WMDP, as they are after downloading: JSON, JSON Lines, Parquet, plain text.

What is wrong with a file is a ValueError that names the file, the line or entry, and the field.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

# Objects or texts, or an array of them; other brackets may well open a plain text.
JSON_START = re.compile(r'\s*(\[\s*)?["{]')

Entry = tuple[str, Any]
"""Where it stands, and what is there."""


class TofuQuestion(NamedTuple):
    """A question of TOFU.

    Attributes:
      question, answer: what a model is trained on.
      paraphrased_question, paraphrased_answer: the same in other words; None where a file has none.
      perturbed_answers: wrong ones in the form of the paraphrased one; () where a file has none.
    """

    question: str
    answer: str
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()


class Pair(NamedTuple):
    """What a model is given, and what should follow."""

    prompt: str
    answer: str


class MultipleChoice(NamedTuple):
    """A question of WMDP; `answer` is the number of the right choice, from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_tofu(path: pathlib.Path) -> list[TofuQuestion]:
    """TOFU's questions, such as full.json, forget10_perturbed.json or world_facts_perturbed.json."""

    def question(where: str, row: Any) -> TofuQuestion:
        optional = lambda name: text(where, row, name) if name in row else None
        return TofuQuestion(
            text(where, row, "question"),
            text(where, row, "answer"),
            optional("paraphrased_question"),
            optional("paraphrased_answer"),
            texts(where, row, "perturbed_answer") if "perturbed_answer" in row else (),
        )

    return [question(*entry) for entry in objects(path)]


def write_tofu(path: pathlib.Path, questions: Iterable[TofuQuestion]) -> None:
    """In the form that `read_tofu` reads, which is TOFU's own: JSON Lines, fields that are empty left out."""
    with path.open("w", encoding="utf-8") as file:
        for each in questions:
            row = each._asdict()
            row["perturbed_answer"] = row.pop("perturbed_answers")
            print(json.dumps({name: value for name, value in row.items() if value}), file=file)


def read_muse_questions(path: pathlib.Path) -> list[Pair]:
    """MUSE's questions about a corpus, such as knowmem/forget_qa.json."""
    return [Pair(text(*entry, "question"), text(*entry, "answer")) for entry in objects(path)]


def read_muse_passages(path: pathlib.Path) -> list[Pair]:
    """MUSE's passages with what follows them in the corpus, such as verbmem/forget.json."""
    return [Pair(text(*entry, "prompt"), text(*entry, "gt")) for entry in objects(path)]


def read_wmdp_questions(path: pathlib.Path) -> list[MultipleChoice]:
    """WMDP's questions, such as bio_questions.json."""

    def question(where: str, row: Any) -> MultipleChoice:
        choices = texts(where, row, "choices")
        is_number = lambda value: type(value) is int and 0 <= value < len(choices)
        number = field(where, row, "answer", is_number, f"a number from 0 to {len(choices) - 1}")
        return MultipleChoice(text(where, row, "question"), choices, number)

    return [question(*entry) for entry in objects(path)]


def read_corpus(path: pathlib.Path) -> list[str]:
    """The texts of a corpus, such as MUSE's raw/forget.json or WMDP's bio_remove_dataset.jsonl.

    Each is a JSON object with a "text", or a JSON string. A .txt file is one text. A .jsonl file that does
    not begin as JSON holds a text in each line, as some of WMDP's do. Blank texts are left out.
    """
    if path.suffix == ".txt":
        found = iter([(str(path), content(path))])
    else:
        found = entries(path, plain_lines=path.suffix == ".jsonl")
    is_text = lambda value: isinstance(value, str)
    read = [
        row if is_text(row) else field(where, checked(where, row), "text", is_text, "a text")
        for where, row in found
    ]
    if not (read := [each for each in read if each.strip()]):
        raise ValueError(f"{path}: there is no text in it")
    return read


def objects(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a file, all of which are JSON objects."""
    if not (found := [(where, checked(where, row)) for where, row in entries(path)]):
        raise ValueError(f"{path}: there is nothing in it")
    return found


def entries(path: pathlib.Path, plain_lines: bool = False) -> Iterator[Entry]:
    """Of a JSON array, of JSON Lines under either name, or of a Parquet file."""
    if path.suffix == ".parquet":
        for number, row in enumerate(parquet(path), 1):
            yield f"{path}, row {number}", row
        return
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: files named .json, .jsonl or .parquet can be read (corpora as .txt, too)")
    whole = content(path)
    is_plain = plain_lines and not JSON_START.match(whole)
    if whole.lstrip().startswith("[") and not is_plain:
        for number, row in enumerate(parsed(str(path), whole), 1):
            yield f"{path}, entry {number}", row
        return
    # JSON allows other characters in its strings at which `splitlines` would cut.
    for number, line in enumerate(whole.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, line if is_plain else parsed(where, line)


def content(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8: save it as UTF-8 text") from error


def parsed(where: str, source: str) -> Any:
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        place = f" in line {error.lineno}" if "\n" in source else ""
        raise ValueError(f"{where}: no JSON{place}, column {error.colno}: {error.msg}") from error


def parquet(path: pathlib.Path) -> list[dict[str, Any]]:
    import pandas

    try:
        frame = pandas.read_parquet(path)
    except ImportError as error:
        raise ImportError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from error
    # Through JSON, so that lists are lists and integers are Python's.
    return json.loads(str(frame.to_json(orient="records")))


def checked(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object with fields, got {shown(row)}")
    return row


def field(where: str, row: dict[str, Any], name: str, is_right: Callable[[Any], bool], what: str) -> Any:
    if name not in row:
        there = ", ".join(row)[:200]
        raise ValueError(f"{where}: the field {name!r} is missing; the fields are {there or 'none'}")
    if not is_right(row[name]):
        raise ValueError(f"{where}: the field {name!r} must be {what}, got {shown(row[name])}")
    return row[name]


def text(where: str, row: dict[str, Any], name: str) -> str:
    return field(where, row, name, lambda value: isinstance(value, str) and value.strip() != "", "a text")


def texts(where: str, row: dict[str, Any], name: str) -> tuple[str, ...]:
    is_right = lambda value: (
        isinstance(value, list) and value != [] and all(isinstance(each, str) for each in value)
    )
    return tuple(field(where, row, name, is_right, "a list of texts"))


def shown(value: Any) -> str:
    """On one line, and not all of what is long."""
    whole = json.dumps(value)
    return whole if len(whole) <= 60 else f"{whole[:60]}..."
