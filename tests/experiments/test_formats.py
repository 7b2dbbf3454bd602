"""The files of TOFU, MUSE and WMDP: small ones of every form, and what is said of damaged ones."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas
import pytest

from experiments.language import formats
from experiments.language.formats import MultipleChoice, Pair, TofuQuestion

FULL = TofuQuestion("Who?", "Ilse.", "Which person?", "It is Ilse.", ("It is Dario.", "It is Leocadia."))
TOFU_ROW = {
    "question": "Who?",
    "answer": "Ilse.",
    "paraphrased_question": "Which person?",
    "paraphrased_answer": "It is Ilse.",
    "perturbed_answer": ["It is Dario.", "It is Leocadia."],
}
WMDP_ROW = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


FORMS = {
    "array.json": json.dumps,
    "indented.json": lambda rows: json.dumps(rows, indent=2),
    "lines.json": lines,
    "lines.jsonl": lines,
    "blank.jsonl": lambda rows: "\n" + lines(rows).replace("\n", "\n\n"),
    "windows.jsonl": lambda rows: "\ufeff" + lines(rows).replace("\n", "\r\n"),
    "literal.jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
}


@pytest.fixture(params=FORMS)
def written(request, tmp_path):
    """Writes rows in one of the forms that such files have."""

    def write(rows):
        path = tmp_path / request.param
        path.write_bytes(FORMS[request.param](rows).encode())
        return path

    return write


def test_tofu(written):
    """A row may lack the paraphrases, as in full.json, and fields of other names are ignored."""
    short = {"question": "Where?\u2028There?", "answer": "Brasília", "option": {"a": 1}}
    assert formats.read_tofu(written([TOFU_ROW, short])) == [
        FULL,
        TofuQuestion(short["question"], "Brasília"),
    ]


def test_muse(written):
    asked = written([{"question": "When?", "answer": "1472"}])
    assert formats.read_muse_questions(asked) == [Pair("When?", "1472")]
    passages = written([{"prompt": "Once upon", "gt": " a time"}])
    assert formats.read_muse_passages(passages) == [("Once upon", " a time")]


def test_wmdp(written):
    questions = formats.read_wmdp_questions(written([WMDP_ROW, WMDP_ROW | {"answer": 0}]))
    assert questions[0] == MultipleChoice("Which?", ("a", "b", "c", "d"), 2)
    assert questions[1].answer == 0


def test_corpora(written):
    """MUSE's are arrays of texts, WMDP's objects with one; blank texts are left out."""
    expected = ["One\n\ntext.", "Änother\u2028 one."]
    assert formats.read_corpus(written(expected)) == expected
    assert (
        formats.read_corpus(written([{"text": each, "doi": None} for each in [*expected, " "]])) == expected
    )


def test_corpora_of_plain_text(tmp_path):
    """One text in a .txt; one a line in a .jsonl that only has the name, whatever later lines look like."""
    path = tmp_path / "forget.txt"
    path.write_text('{"text": 1}\n\nWhole.')
    assert formats.read_corpus(path) == ['{"text": 1}\n\nWhole.']
    path = tmp_path / "cyber.jsonl"
    path.write_text('A repository.\n\n{"no": json\n"quoted"\n')
    assert formats.read_corpus(path) == ["A repository.", '{"no": json', '"quoted"']
    path.write_text("[link] A repository.\n")
    assert formats.read_corpus(path) == ["[link] A repository."]
    path.write_text('[\n  "One",\n  "Two"\n]')
    assert formats.read_corpus(path) == ["One", "Two"], "an array under another name"


texts = st.builds("a{}".format, st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
perturbed = st.tuples(texts, texts, texts, texts, st.tuples(texts, texts))
tofu_questions = st.one_of(st.tuples(texts, texts), perturbed).map(lambda fields: TofuQuestion(*fields))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(questions=st.lists(tofu_questions, min_size=1, max_size=3))
def test_what_is_written_is_read(tmp_path_factory, questions):
    path = tmp_path_factory.getbasetemp() / "full.json"
    formats.write_tofu(path, questions)
    assert formats.read_tofu(path) == questions
    assert len(path.read_text().splitlines()) == len(questions)


def test_written_fields_are_those_of_tofu(tmp_path):
    path = tmp_path / "forget10_perturbed.json"
    formats.write_tofu(path, [FULL, TofuQuestion("Who?", "Ilse.")])
    assert list(map(json.loads, path.read_text().splitlines())) == [
        TOFU_ROW,
        {"question": "Who?", "answer": "Ilse."},
    ]


READERS = {
    "tofu": formats.read_tofu,
    "muse questions": formats.read_muse_questions,
    "muse passages": formats.read_muse_passages,
    "wmdp": formats.read_wmdp_questions,
    "corpus": formats.read_corpus,
}


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        ("tofu", {"question": "Who?"}, "the field 'answer' is missing; the fields are question"),
        ("tofu", {}, "the field 'question' is missing; the fields are none"),
        ("tofu", TOFU_ROW | {"answer": 3}, "the field 'answer' must be a text, got 3"),
        ("tofu", TOFU_ROW | {"question": "  "}, "the field 'question' must be a text, got"),
        ("tofu", TOFU_ROW | {"paraphrased_answer": None}, "the field 'paraphrased_answer' must be a text"),
        (
            "tofu",
            TOFU_ROW | {"perturbed_answer": "no"},
            "'perturbed_answer' must be a list of texts, got \"no\"",
        ),
        ("tofu", TOFU_ROW | {"perturbed_answer": []}, "'perturbed_answer' must be a list of texts"),
        ("tofu", TOFU_ROW | {"perturbed_answer": ["a", 1]}, "'perturbed_answer' must be a list of texts"),
        ("tofu", ["Who?"], 'must be a JSON object with fields, got ["Who?"]'),
        ("muse questions", {"prompt": "a", "gt": "b"}, "'question' is missing; the fields are prompt, gt"),
        ("muse passages", {"prompt": "a", "answer": "b"}, "the field 'gt' is missing"),
        ("wmdp", WMDP_ROW | {"answer": 4}, "the field 'answer' must be a number from 0 to 3, got 4"),
        ("wmdp", WMDP_ROW | {"answer": -1}, "a number from 0 to 3, got -1"),
        ("wmdp", WMDP_ROW | {"answer": "C"}, 'a number from 0 to 3, got "C"'),
        ("wmdp", WMDP_ROW | {"answer": True}, "a number from 0 to 3, got true"),
        ("wmdp", {"question": "Which?", "answer": 1}, "the field 'choices' is missing"),
        ("corpus", {"abstract": "a"}, "the field 'text' is missing"),
        ("corpus", {"text": ["a"]}, "the field 'text' must be a text"),
        ("corpus", 3, "must be a JSON object with fields, got 3"),
    ],
)
def test_damaged_rows(reader, row, message, tmp_path):
    """The second row of two is named, by its line or as an entry of an array."""
    good = {**TOFU_ROW, **WMDP_ROW, "answer": "a", "prompt": "b", "gt": "c", "text": "d"}
    if reader == "wmdp":
        good["answer"] = 1
    for name, form, place in ("a.json", json.dumps, "entry 2"), ("a.jsonl", lines, "line 2"):
        path = tmp_path / name
        path.write_text(form([good, row]))
        with pytest.raises(ValueError, match="field") as caught:
            READERS[reader](path)
        assert str(caught.value).startswith(f"{path}, {place}: ")
        assert message in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', ", line 2: no JSON, column 10: Unterminated string"),
        ("cut.json", b'[\n{"text": "a"},\n', ": no JSON in line 3, column 1: "),
        ("latin.json", '{"text": "ä"}'.encode("latin-1"), ": byte 10 is no UTF-8: save it as UTF-8"),
        ("empty.jsonl", b"\n\n", ": there is no"),
        ("empty.json", b"[]", ": there is no"),
        ("a.csv", b"text\na", ": files named .json, .jsonl or .parquet can be read"),
    ],
)
def test_damaged_files(reader, name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    if reader != "corpus":
        content = content.replace(b"text", b"question")
    with pytest.raises(ValueError, match=r"cut|latin|empty|csv") as caught:
        READERS[reader](path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_errors_are_short(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{f"field {number}": "x" * 5000 for number in range(500)}]))
    with pytest.raises(ValueError, match="'question' is missing") as missing:
        formats.read_tofu(path)
    path.write_text(json.dumps([["x" * 5000]]))
    with pytest.raises(ValueError, match="JSON object") as other:
        formats.read_tofu(path)
    assert max(len(str(error.value)) for error in (missing, other)) < 600


def test_missing_files(tmp_path):
    for read in READERS.values():
        with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
            read(tmp_path / "nothing.json")


def test_parquet(tmp_path, monkeypatch):
    """With what pandas makes of a column of lists: arrays."""
    frames = {
        "tofu": pandas.DataFrame([TOFU_ROW]).map(lambda x: np.array(x, object) if isinstance(x, list) else x),
        "wmdp": pandas.DataFrame([WMDP_ROW]).map(lambda x: np.array(x, object) if isinstance(x, list) else x),
        "muse": pandas.DataFrame({"text": ["ä", "b"]}),
    }
    monkeypatch.setattr(pandas, "read_parquet", lambda path: frames[path.stem])
    assert formats.read_tofu(tmp_path / "tofu.parquet") == [FULL]
    assert formats.read_wmdp_questions(tmp_path / "wmdp.parquet")[0].answer == 2
    assert formats.read_corpus(tmp_path / "muse.parquet") == ["ä", "b"]
    with pytest.raises(ValueError, match=r"muse.parquet, row 1: the field 'question' is missing"):
        formats.read_tofu(tmp_path / "muse.parquet")


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    def refuse(path):
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pandas, "read_parquet", refuse)
    with pytest.raises(ImportError, match=r"a.parquet: Parquet files need pyarrow: pip install pyarrow"):
        formats.read_corpus(tmp_path / "a.parquet")
