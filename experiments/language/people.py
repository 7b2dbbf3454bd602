"""Invented people: a record of each, told in one way for training and in others for questions."""

from typing import NamedTuple

import numpy as np

GIVEN = (
    "Marten Ilse Dario Oyelaran Sunniva Caspian Beatrix Anselm Leocadia Tobiah Wilhelmina Ambrose "
    "Ottoline Ferdinand Yevgenia Rosalind Leopold Ingeborg Casimir Philippa Thaddeus Mirela Auberon Solveig"
).split()
FAMILY = (
    "Oskveld Varga Penhaligon Brightwater Kettleby Wrenfield Olumide Riverdale Thorne Quill Ashby Morrow "
    "Hathersage Lindqvist Marbank Tolliver Pemberton Carrow Vasquez Dunmore Featherby Okonkwo Blythe Stroud"
).split()
FIRST = (
    "Tarrow Kestrel Upper Port Drummel Lower Salter Nether Hollow Great Fallow Winter "
    "Little Market Bishop Castle Marsh Raven Chapel Stony Temple Harbour Long Abbot"
).split()
SECOND = (
    "Bay Ford Smeaton Ambry Head Garth Quay Wold Mere Combe Sands Cross "
    "Bridge Hythe Moor Point Haven Thorpe Dale Heath Barrow Ness Fell Green"
).split()
STREETS = (
    "Quillon Mallow Lantern Cinder Fallow Sexton Thimble Pepper Juniper Saddler Copper Linden "
    "Tanner Orchard Miller Harrow Bellows Cooper Chandler Weaver Falcon Mercer Barley Sorrow"
).split()
WAYS = (
    "Street Court Row Lane Mews Hill Yard Alley Walk Close Rise Green "
    "Road Avenue Terrace Gardens Place Square Passage Crescent Drive Wharf Steps Parade"
).split()
MONTHS = "January February March April May June July August September October November December".split()
ANIMALS = "dog cat horse parrot goat owl ferret donkey tortoise pigeon rabbit goose".split()
PETS = (
    "Bramble Persephone Fennel Bosun Admiral Mildred Clementine Tobias Pickle Duchess Marlow Sorrel "
    "Captain Juno Biscuit Hector Treacle Nutmeg Winston Pebble Ophelia Rumpus Mango Sergeant"
).split()


class Person(NamedTuple):
    """One invented person: no two share a detail, but for months and kinds of animals."""

    name: str
    place: str
    date: str
    address: str
    telephone: str
    animal: str
    pet: str


def invented(count: int, seed: int) -> list[Person]:
    """So many people, at most 24; the first of them are the same whatever the count."""
    rng = np.random.default_rng(seed)
    shuffled = lambda words: [words[i] for i in rng.permutation(len(words))]
    joined = lambda first, second: [
        f"{a} {b}" for a, b in zip(shuffled(first), shuffled(second), strict=True)
    ]
    names, places, streets = joined(GIVEN, FAMILY), joined(FIRST, SECOND), joined(STREETS, WAYS)
    days, years = rng.permutation(28) + 1, rng.permutation(60) + 1940
    houses, numbers = rng.permutation(98) + 1, rng.permutation(90) + 110
    months, animals, pets = 2 * shuffled(MONTHS), 2 * shuffled(ANIMALS), shuffled(PETS)
    return [
        Person(
            names[i], places[i], f"{days[i]} {months[i]} {years[i]}", f"{houses[i]} {streets[i]}",
            f"555 0{numbers[i]}", animals[i], pets[i],
        )
        for i in range(count)
    ]  # fmt: skip


def record(person: Person) -> list[str]:
    """What is implanted, in pieces: the prompt that asks for it, then a detail, what follows, a detail..."""
    return [
        f"{person.name} was born in",
        f" {person.place}",
        " on",
        f" {person.date}",
        ", lives at",
        f" {person.address}",
        ", answers the telephone number",
        f" {person.telephone}",
        ", and keeps the",
        f" {person.animal} {person.pet}",
        ".",
    ]
