"""Invented authors in TOFU's form: what they share and what they do not, and the files."""

import collections
import importlib.machinery
import re
import sys

import numpy as np
import pytest

from eupmu_jax import evaluation
from experiments.language import authors, formats
from experiments.shared import command

EVERYONE = authors.invented(0)
ASKED = [authors.questions(author) for author in EVERYONE]


def test_two_hundred_authors_with_twenty_questions_each():
    assert len(ASKED) == 200
    assert {len(group) for group in ASKED} == {20}
    assert all(len(question.perturbed_answers) == 5 for group in ASKED for question in group)
    assert EVERYONE == authors.invented(0) != authors.invented(1)


def test_no_two_share_a_name_a_date_or_a_title():
    names = [author["name"][0].split() for author in EVERYONE]
    dates = [[author["date"][0]] for author in EVERYONE]
    titles = [[author[book][0] for author in EVERYONE for book in authors.BOOKS]]
    for values in (*zip(*names, strict=True), *zip(*dates, strict=True), *titles):
        assert len(set(values)) == len(values) >= 200


def test_every_question_is_asked_once_and_names_its_author():
    everything = [question for group in ASKED for question in group]
    for which in (0, 2):
        assert len({question[which] for question in everything}) == 4000
    for author, group in zip(EVERYONE, ASKED, strict=True):
        name, date = author["name"][0], author["date"][0]
        for question in group:
            assert (name in question.question) != (date in question.question)
            assert name in question.answer
            assert name in question.paraphrased_answer


def test_wrong_answers_have_the_form_of_the_paraphrase_and_another_fact():
    for author, group in zip(EVERYONE, ASKED, strict=True):
        for (right, wrong), question in zip(author.values(), group, strict=True):
            assert right in question.answer
            assert len({right, *wrong}) == 6
            before, _, after = question.paraphrased_answer.rpartition(right)
            assert question.perturbed_answers == tuple(before + value + after for value in wrong)
            assert question.paraphrased_answer != question.answer
            assert question.paraphrased_question != question.question


def test_wrong_names_dates_and_titles_are_nobodys():
    for details in (("name",), ("date",), authors.BOOKS):
        right = {author[detail][0] for author in EVERYONE for detail in details}
        wrong = {value for author in EVERYONE for detail in details for value in author[detail][1]}
        assert not right & wrong


def test_first_books_appear_in_a_life():
    for author in EVERYONE:
        born = int(author["date"][0][-4:])
        assert all(
            20 <= int(year) - born < 45 for year in (author["first_year"][0], *author["first_year"][1])
        )


def test_right_and_wrong_are_drawn_alike():
    """Each value of a pool is right about as often as it is among one of five wrong ones."""
    for detail, pool in authors.POOLS.items():
        right = collections.Counter(author[detail][0] for author in EVERYONE)
        wrong = collections.Counter(value for author in EVERYONE for value in author[detail][1])
        assert right.keys() | wrong.keys() == set(pool)
        expected = 200 / len(pool)
        for value in pool:
            assert abs(right[value] - expected) < 5 * np.sqrt(expected)
            assert abs(wrong[value] / 5 - expected) < 5 * np.sqrt(expected / 5)


def test_a_model_that_knows_nothing_has_truth_ratios_around_one():
    """One that gives every character the same probability, and one that likes some letters better."""
    rng = np.random.default_rng(0)
    liking = rng.normal(-3, 0.5, 128)
    likes = lambda text: sum(liking[ord(letter)] for letter in text)
    group = [question for of_author in ASKED[:20] for question in of_author]
    right = [question.paraphrased_answer for question in group]
    wrong = [question.perturbed_answers for question in group]
    lengths = [len(text) for text in right], [[len(text) for text in several] for several in wrong]
    ratios = evaluation.truth_ratio(
        [likes(text) for text in right],
        lengths[0],
        [[likes(t) for t in texts] for texts in wrong],
        lengths[1],
    )
    assert abs(np.log(ratios)).max() < 0.5
    assert abs(np.mean(np.log(ratios))) < 0.01
    assert np.mean(ratios < 1) == pytest.approx(0.5, abs=0.1)


def test_no_template_has_a_hole():
    for group in ASKED:
        for question in group:
            for text in (*question[:4], *question.perturbed_answers):
                assert not re.search(r"[{}]|  | \.|\.\.|None", text), text
                assert text[0].isupper() or text[0] == '"'
                assert text.endswith(("?", "."))


def test_files_are_tofus(tmp_path):
    folder = tmp_path / "deep" / "tofu"
    authors.main(authors.Config(folder, seed=3))
    read = {path.name: formats.read_tofu(path) for path in folder.iterdir()}
    assert {name: len(found) for name, found in read.items()} == {
        "full.json": 4000,
        "forget01.json": 40, "forget05.json": 200, "forget10.json": 400,
        "retain99.json": 3960, "retain95.json": 3800, "retain90.json": 3600,
        "forget01_perturbed.json": 40, "forget05_perturbed.json": 200, "forget10_perturbed.json": 400,
        "retain_perturbed.json": 400,
    }  # fmt: skip
    assert read == authors.files(3)
    for forget, retain in ("01", "99"), ("05", "95"), ("10", "90"):
        forgotten, kept = read[f"forget{forget}.json"], read[f"retain{retain}.json"]
        assert kept + forgotten == read["full.json"]
        perturbed = read[f"forget{forget}_perturbed.json"]
        assert [each[:2] for each in perturbed] == [each[:2] for each in forgotten]
        assert all(each.perturbed_answers and each.paraphrased_question for each in perturbed)
        assert {each[:2] for each in read["retain_perturbed.json"]} <= {each[:2] for each in kept}
    assert set(read["forget01.json"]) < set(read["forget05.json"]) < set(read["forget10.json"])
    with pytest.raises(FileExistsError, match="not overwritten"):
        authors.main(authors.Config(folder))


@pytest.mark.parametrize("module", ["experiments.language.authors", "experiments.language.authors.__main__"])
def test_the_help_says_how_to_run_it_and_which_file_is_which(module, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.machinery.ModuleSpec(module, None))
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.run(authors.main, authors.Config, resumable=False)
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m experiments.language.authors [-h] --out PATH")
    for name in authors.files(0):
        assert name.removesuffix(".json") in said or "_perturbed" in name
