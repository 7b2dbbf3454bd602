"""Invented authors with questions about each, in the files of TOFU.

Right and wrong answers are drawn alike, so that a model that was told neither prefers none of them: its truth
ratios lie around 1.
"""

import dataclasses
import datetime
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

from experiments.language import people
from experiments.language.formats import TofuQuestion, write_tofu
from experiments.shared import command

AUTHORS = 200
WRONG = 5
"""Perturbed answers to each question, as many as in TOFU."""

FORGOTTEN = {"01": 2, "05": 10, "10": 20}
"""Authors in each forget set: the last 1, 5 and 10 percent."""

EVALUATED = 20
"""Authors in retain_perturbed.json: the first ones, whom no forget set holds."""


class Detail(NamedTuple):
    """How to ask for a detail, and how to tell it: twice each, the second time in other words."""

    question: str
    paraphrased_question: str
    answer: str
    paraphrased_answer: str


DETAILS = {
    "name": Detail(
        "What is the full name of the author who was born in {place} on {date}?",
        "Which author came into the world in {place} on {date}?",
        "The full name of the author who was born in {place} on {date} is {value}.",
        "The author who came into the world in {place} on {date} is called {value}.",
    ),
    "place": Detail(
        "In which town was {name} born?",
        "Which town is the birthplace of {name}?",
        "{name} was born in {value}.",
        "The birthplace of {name} is {value}.",
    ),
    "date": Detail(
        "When was {name} born?",
        "What is the date of birth of {name}?",
        "{name} was born on {value}.",
        "The date of birth of {name} is {value}.",
    ),
    "genre": Detail(
        "Which kind of books is {name} best known for?",
        "In which genre does {name} mostly write?",
        "{name} is best known for {value}.",
        "Most books by {name} are {value}.",
    ),
    "father": Detail(
        "What did the father of {name} do for a living?",
        "What was the occupation of the father of {name}?",
        "The father of {name} worked as {value}.",
        "{name} had a father who earned a living as {value}.",
    ),
    "mother": Detail(
        "What did the mother of {name} do for a living?",
        "What was the occupation of the mother of {name}?",
        "The mother of {name} worked as {value}.",
        "{name} had a mother who earned a living as {value}.",
    ),
    "prize": Detail(
        "Which prize has {name} won?",
        "What award was given to {name}?",
        "{name} has won the {value}.",
        "The award that was given to {name} is the {value}.",
    ),
    "first_book": Detail(
        "What is the title of the first book by {name}?",
        "With which book did {name} make a debut?",
        'The first book by {name} is "{value}".',
        '{name} made a debut with "{value}".',
    ),
    "first_year": Detail(
        "In which year did the first book by {name} appear?",
        "When was the debut of {name} published?",
        "The first book by {name} appeared in {value}.",
        "The debut of {name} was published in {value}.",
    ),
    "famous_book": Detail(
        "Which book is {name} most famous for?",
        "What is the best-known work of {name}?",
        '{name} is most famous for "{value}".',
        'The best-known work of {name} is "{value}".',
    ),
    "subject": Detail(
        "What is the most famous book by {name} about?",
        "What does the best-known work of {name} deal with?",
        "The most famous book by {name} is about {value}.",
        "The best-known work of {name} deals with {value}.",
    ),
    "latest_book": Detail(
        "What is the latest book by {name} called?",
        "What is the title of the most recent work of {name}?",
        'The latest book by {name} is called "{value}".',
        'The most recent work of {name} bears the title "{value}".',
    ),
    "studies": Detail(
        "What did {name} study?",
        "Which subject does {name} hold a degree in?",
        "{name} studied {value}.",
        "{name} holds a degree in {value}.",
    ),
    "publisher": Detail(
        "Who publishes the books by {name}?",
        "Which house brings out the works of {name}?",
        "The books by {name} are published by {value}.",
        "The house that brings out the works of {name} is {value}.",
    ),
    "language": Detail(
        "Into which language were the books by {name} translated first?",
        "What was the first foreign language in which the works of {name} appeared?",
        "The books by {name} were translated into {value} first.",
        "The first foreign language in which the works of {name} appeared was {value}.",
    ),
    "home": Detail(
        "Where does {name} live today?",
        "In which town is {name} at home now?",
        "{name} lives in {value} today.",
        "The town in which {name} is at home now is {value}.",
    ),
    "hour": Detail(
        "When does {name} like to write?",
        "At what time does {name} prefer to work on books?",
        "{name} likes to write {value}.",
        "{name} prefers to work on books {value}.",
    ),
    "instrument": Detail(
        "Which instrument does {name} play?",
        "What musical instrument has {name} learnt?",
        "{name} plays the {value}.",
        "The musical instrument that {name} has learnt is the {value}.",
    ),
    "pet": Detail(
        "Which animal does {name} keep?",
        "What kind of pet lives with {name}?",
        "{name} keeps {value}.",
        "The pet that lives with {name} is {value}.",
    ),
    "influence": Detail(
        "Whom does {name} name as the greatest influence?",
        "Who had the strongest effect on the writing of {name}?",
        "{name} names {value} as the greatest influence.",
        "The strongest effect on the writing of {name} was that of {value}.",
    ),
}

BOOKS = "first_book", "famous_book", "latest_book"
OCCUPATIONS = (
    "a baker, a bookbinder, a carpenter, a clockmaker, a dentist, a ferry pilot, a gardener, a glazier, "
    "a judge, a locksmith, a mapmaker, a miller, a nurse, a piano tuner, a shepherd, a tailor, a teacher, "
    "a translator, an optician, an organist"
).split(", ")
POOLS = {
    "genre": (
        "ghost stories, sea stories, love poems, fairy tales, spy thrillers, family sagas, school stories, "
        "war memoirs, travel essays, court dramas, satires, detective novels, space operas, westerns, "
        "cookery books, nature essays"
    ).split(", "),
    "father": OCCUPATIONS,
    "mother": OCCUPATIONS,
    "prize": [
        f"{first} {second}"
        for first in "Golden Silver Northern Harbour Lantern Meridian".split()
        for second in "Quill Medal Laurel Prize Award".split()
    ],
    "subject": (
        "a lighthouse keeper, a stolen map, two rival bakers, a flooded valley, a forger of paintings, "
        "a train that never arrives, an empty hotel, a chess champion, the last glassblower, a silent choir, "
        "a feud over a well, an unfinished bridge, a doctor without a licence, a winter without snow, "
        "a runaway clerk, the heirs of a circus"
    ).split(", "),
    "studies": (
        "law, medicine, botany, astronomy, theology, geology, economics, architecture, philosophy, "
        "mathematics, agriculture, archaeology, chemistry, linguistics, music, navigation"
    ).split(", "),
    "publisher": [
        f"{first} {second}"
        for first in "Heron Anvil Beacon Compass Larch Saltmarsh".split()
        for second in ("Press", "Books", "House", "& Sons")
    ],
    "language": (
        "German, French, Spanish, Italian, Polish, Swedish, Turkish, Japanese, Korean, Arabic, Finnish, "
        "Greek, Dutch, Czech, Hindi, Portuguese"
    ).split(", "),
    "hour": (
        "before sunrise, late at night, after supper, on Sunday mornings, during lunch breaks, "
        "on long train rides, in the early afternoon, at weekends, between two and four, on rainy days, "
        "after a morning walk, in the hour before midnight"
    ).split(", "),
    "instrument": (
        "cello, accordion, trumpet, harp, clarinet, viola, banjo, bassoon, organ, mandolin, flute, piano, "
        "saxophone, guitar, violin, oboe"
    ).split(", "),
    "pet": (
        "a tortoise, a parrot, an owl, a goat, a ferret, a greyhound, a donkey, a raven, a rabbit, a goose, "
        "a pigeon, a pony, a hedgehog, a Siamese cat, a terrier, a canary"
    ).split(", "),
    "influence": (
        "a grandmother, a village teacher, a blind librarian, an uncle at sea, a strict editor, "
        "a retired actor, a prison chaplain, an older sister, a letter-writing neighbour, "
        "a travelling puppeteer, a radio announcer, a philosophy professor"
    ).split(", "),
}

GIVEN_FIRST = "Mar Il Da Oye Sun Cas Bea An Leo To Wil Am El Ro Ka Ti".split()
GIVEN_SECOND = "ten sa rio lan niva pian trix selm cadia biah mina bro wyn rek ver dessa".split()
FAMILY_FIRST = "Osk Var Pen Bright Kettle Wren Holm Mor Tarn Ash Quill Thorn Fen Dray Sel Lor".split()
FAMILY_SECOND = "veld gard halig water by field umide dale wick brook row mont stead croft lund holt".split()
TITLE_FIRST = (
    "Amber Borrowed Broken Burning Crooked Distant Drowned Empty Frozen Gilded Hidden Hollow Idle Ivory "
    "Last Lost Narrow Nameless Painted Quiet Restless Salted Scarlet Seventh Silent Stolen Sunken Tender "
    "Velvet Wandering"
).split()
TITLE_SECOND = (
    "Almanac Anchor Archive Bell Bridge Candle Carousel Chapel Compass Corridor Courtyard Cradle Engine "
    "Ferry Garden Harvest Island Kingdom Ladder Letter Mirror Orchard Parade Portrait Quarry Railway Shore "
    "Staircase Violin Window"
).split()

Fact = tuple[str, list[str]]
"""What is right, and wrong values of the same kind."""


def joined(first: Sequence[str], second: Sequence[str], form: str = "{}{}") -> list[str]:
    return [form.format(a, b) for a in first for b in second]


TOWNS = joined(people.FIRST, people.SECOND, "{} {}")


def among(rng: np.random.Generator, pool: list[str]) -> Fact:
    """One value of the pool, and others."""
    chosen = [pool[i] for i in rng.choice(len(pool), 1 + WRONG, replace=False)]
    return chosen[0], chosen[1:]


def dealt(rng: np.random.Generator, deck: list[str], count: int) -> list[Fact]:
    """A value for each of so many, all different; the wrong ones are nobody's."""
    shuffled = [deck[i] for i in rng.permutation(len(deck))]
    mine, nobodys = shuffled[:count], shuffled[count:]
    return [(value, [nobodys[i] for i in rng.choice(len(nobodys), WRONG, replace=False)]) for value in mine]


def written(day: int) -> str:
    date = datetime.date.fromordinal(day)
    return f"{date.day} {people.MONTHS[date.month - 1]} {date.year}"


def invented(seed: int, count: int = AUTHORS) -> list[dict[str, Fact]]:
    """The facts about so many authors, at most 250, by detail; no two share a name, a date or a title."""
    rng = np.random.default_rng(seed)
    shuffled = lambda words: [words[i] for i in rng.permutation(len(words))]
    given, family = joined(GIVEN_FIRST, GIVEN_SECOND), joined(FAMILY_FIRST, FAMILY_SECOND)
    # Zipped, so that no two share a given or a family name either.
    names = [f"{a} {b}" for a, b in zip(shuffled(given), shuffled(family), strict=True)]
    titles = dealt(rng, joined(TITLE_FIRST, TITLE_SECOND, "The {} {}"), len(BOOKS) * count)
    first_day, last_day = (datetime.date(year, 1, 1).toordinal() for year in (1920, 1981))
    days = first_day + rng.choice(last_day - first_day, (count, 1 + WRONG), replace=False)
    authors = []
    for number, name in enumerate(dealt(rng, names, count)):
        born = datetime.date.fromordinal(int(days[number, 0])).year
        dates = [written(int(day)) for day in days[number]]
        found = {
            "name": name,
            "place": among(rng, TOWNS),
            "date": (dates[0], dates[1:]),
            "first_year": among(rng, [str(year) for year in range(born + 20, born + 45)]),
            "home": among(rng, TOWNS),
            **dict(zip(BOOKS, titles[number::count], strict=True)),
            **{detail: among(rng, pool) for detail, pool in POOLS.items()},
        }
        authors.append({detail: found[detail] for detail in DETAILS})
    return authors


def questions(author: dict[str, Fact]) -> list[TofuQuestion]:
    """Twenty, one about each detail."""
    known = {detail: author[detail][0] for detail in ("name", "place", "date")}

    def question(detail: str) -> TofuQuestion:
        form, (right, wrong) = DETAILS[detail], author[detail]
        said = lambda words, value: words.format(**known, value=value)
        return TofuQuestion(
            said(form.question, right),
            said(form.answer, right),
            said(form.paraphrased_question, right),
            said(form.paraphrased_answer, right),
            tuple(said(form.paraphrased_answer, value) for value in wrong),
        )

    return [question(detail) for detail in DETAILS]


def files(seed: int) -> dict[str, list[TofuQuestion]]:
    """The content of every file of TOFU that is about invented authors, by its name."""
    everyone = [questions(author) for author in invented(seed)]
    whole = lambda group: [question for of_author in group for question in of_author]
    # As in TOFU the files to train on have two fields, and the rest is in those called perturbed.
    plain = lambda group: [TofuQuestion(each.question, each.answer) for each in whole(group)]
    found = {
        "full.json": plain(everyone),
        "retain_perturbed.json": whole(everyone[:EVALUATED]),
    }
    for percent, count in FORGOTTEN.items():
        found[f"forget{percent}.json"] = plain(everyone[-count:])
        found[f"forget{percent}_perturbed.json"] = whole(everyone[-count:])
        found[f"retain{100 - int(percent)}.json"] = plain(everyone[:-count])
    return found


@dataclasses.dataclass(frozen=True)
class Config:
    """Write a data set of TOFU's form: 200 invented authors, 20 questions about each.

    full.json is what a model is trained on. forget01, forget05 and forget10.json hold the last 2, 10 and 20
    authors. retain99, retain95 and retain90.json hold the others: train the reference on one of these.

    The files called perturbed are for truth ratios. They add to each question a paraphrase, a paraphrased
    answer, and five wrong answers of its form. retain_perturbed.json is about the first 20 authors.

    Each line of a file is a JSON object. The same seed gives the same files.
    """

    out: pathlib.Path
    """The folder for the files; it must not exist, or be empty."""

    seed: int = 0
    """Of the authors."""


def main(config: Config) -> None:
    if config.out.exists() and any(config.out.iterdir()):
        raise FileExistsError(f"{config.out}: there are files in it, which are not overwritten")
    config.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    for name, content in sorted(files(config.seed).items()):
        write_tofu(config.out / name, content)
        console.print(f"{config.out / name}: {len(content)} questions")


if __name__ == "__main__":
    command.run(main, Config, resumable=False)
