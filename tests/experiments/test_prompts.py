"""Prompts for the invented people in other words and languages."""

import re

import pytest

from experiments.language import people, prompts
from experiments.language.people import Person

EVERYONE = people.invented(24, seed=0)
ILSE = Person("Ilse Varga", "Tarrow Bay", "1 March 1950", "12 Mallow Row", "555 0123", "owl", "Bramble")
MARTEN = ILSE._replace(name="Marten Quill", date="28 August 1999", animal="dog")
DETAILS = set(Person._fields) - {"name"}


def test_every_kind_asks_for_every_detail():
    for kind, by_detail in prompts.PROMPTS.items():
        assert by_detail.keys() == DETAILS
        fewest = 3 if kind == prompts.PARAPHRASE else 2
        assert all(len(set(forms)) == len(forms) >= fewest for forms in by_detail.values())


@pytest.mark.parametrize("person", [*EVERYONE, ILSE, MARTEN])
def test_prompts_name_the_person_and_nothing_else(person):
    record = people.record(person)
    trained = {"".join(record[:number]) for number in range(len(record))}
    holds = lambda text, word: re.search(rf"\b{re.escape(word)}\b", text)
    seen = set()
    for pairs in prompts.prompts(person).values():
        for prompt, answer in pairs:
            assert person.name in prompt
            assert not any(holds(prompt, getattr(person, detail)) for detail in DETAILS)
            assert re.fullmatch(r" \S.*\S", answer)
            assert not holds(prompt, answer.strip())
            assert not re.search(r"[{}]|  ", prompt)
            assert prompt == prompt.strip()
            seen.add(prompt)
    assert len(seen) == sum(map(len, prompts.prompts(person).values()))
    assert not seen & trained


def test_answers_are_the_details_or_their_translations():
    """In the order of the details, as often as each is asked for."""
    expected = {
        prompts.PARAPHRASE: ("1 March 1950", "owl"),
        prompts.GERMAN: ("1. März 1950", "Eule"),
        prompts.FRENCH: ("1er mars 1950", "chouette"),
        prompts.SPANISH: ("1 de marzo de 1950", "búho"),
    }
    found = prompts.prompts(ILSE)
    assert found.keys() == expected.keys()
    for kind, (date, animal) in expected.items():
        details = {**ILSE._asdict(), "date": date, "animal": animal}
        told = [details[detail] for detail, forms in prompts.PROMPTS[kind].items() for _ in forms]
        assert [answer for _, answer in found[kind]] == [f" {each}" for each in told]
    dates = {kind: prompts.date(kind, "28 August 1999") for kind in expected}
    assert dates == {
        prompts.PARAPHRASE: "28 August 1999",
        prompts.GERMAN: "28. August 1999",
        prompts.FRENCH: "28 août 1999",
        prompts.SPANISH: "28 de agosto de 1999",
    }


def test_french_elides_before_vowels():
    for person, of in (ILSE, "d'Ilse Varga"), (MARTEN, "de Marten Quill"):
        found = [prompt for prompt, _ in prompts.prompts(person)[prompts.FRENCH]]
        assert f"Le lieu de naissance {of} est" in found
        assert not any(re.search(r"\bde [AEIOU]", prompt) for prompt in found)
    others = [pair for kind in (prompts.GERMAN, prompts.SPANISH) for pair in prompts.prompts(ILSE)[kind]]
    assert not any("d'" in prompt for prompt, _ in others)


def test_every_month_and_animal_has_a_word_of_its_own():
    for table, words in (prompts.MONTHS_IN, people.MONTHS), (prompts.ANIMALS_IN, people.ANIMALS):
        assert table.keys() == {prompts.GERMAN, prompts.FRENCH, prompts.SPANISH}
        assert all(len(set(translated)) == len(translated) == len(words) for translated in table.values())
