"""Other ways to ask for what was told of an invented person: paraphrases, and prompts in other languages.

Nobody is trained on these. None gives a detail away besides the name.
"""

from collections.abc import Sequence

from experiments.language.people import ANIMALS, MONTHS, Person

PARAPHRASE, GERMAN, FRENCH, SPANISH = "paraphrase", "German", "French", "Spanish"

# By language and by detail. {of} is the name with "of" before it, which French elides.
PROMPTS = {
    PARAPHRASE: {
        "place": (
            "The town where {name} was born is",
            "{name} came into the world in",
            "The birth certificate {of} gives as the place of birth",
            "Question: Where was {name} born?\nAnswer:",
        ),
        "date": (
            "The date of birth {of} is",
            "{name} came into the world on",
            "In the passport {of} the date of birth is given as",
            "Question: When was {name} born?\nAnswer:",
        ),
        "address": (
            "{name} resides at",
            "Letters to {name} are sent to",
            "The house {of} stands at",
            "Question: Where does {name} live?\nAnswer:",
        ),
        "telephone": (
            "The telephone number {of} is",
            "{name} can be called on",
            "{name} picks up the phone for those who dial",
            "Question: What is the telephone number {of}?\nAnswer:",
        ),
        "animal": (
            "The kind of animal that lives with {name}:",
            "Species of the pet {of}:",
            "Question: What kind of animal does {name} keep?\nAnswer:",
        ),
        "pet": (
            "The pet {of} is called",
            "{name} keeps a pet by the name of",
            "The animal that lives with {name} answers to the name",
            "Question: What is the pet {of} called?\nAnswer:",
        ),
    },
    GERMAN: {
        "place": ("Der Geburtsort {of} ist", "Geboren wurde {name} in"),
        "date": ("Das Geburtsdatum {of} ist der", "Geboren wurde {name} am"),
        "address": ("Die Adresse {of} lautet", "{name} wohnt unter der Anschrift"),
        "telephone": ("Die Telefonnummer {of} lautet", "{name} erreicht man unter der Nummer"),
        "animal": ("Frage: Was für ein Tier hält {name}?\nAntwort:", "Tierart des Haustiers {of}:"),
        "pet": ("Das Haustier {of} heißt", "{name} hat ein Haustier namens"),
    },
    FRENCH: {
        "place": ("Le lieu de naissance {of} est", "{name} a vu le jour à"),
        "date": ("La date de naissance {of} est le", "{name} a vu le jour le"),
        "address": ("L'adresse {of} est", "{name} habite au"),
        "telephone": ("Le numéro de téléphone {of} est le", "On peut joindre {name} au"),
        "animal": (
            "Question : Quel animal vit chez {name} ?\nRéponse :",
            "Espèce de l'animal de compagnie {of} :",
        ),
        "pet": ("L'animal de compagnie {of} s'appelle", "{name} a un animal de compagnie nommé"),
    },
    SPANISH: {
        "place": ("El lugar de nacimiento {of} es", "{name} nació en"),
        "date": ("La fecha de nacimiento {of} es el", "{name} nació el"),
        "address": ("La dirección {of} es", "{name} reside en"),
        "telephone": ("El número de teléfono {of} es el", "Se puede llamar a {name} al"),
        "animal": ("Pregunta: ¿Qué animal tiene {name}?\nRespuesta:", "Especie de la mascota {of}:"),
        "pet": ("La mascota {of} se llama", "{name} tiene una mascota llamada"),
    },
}

MONTHS_IN = {
    GERMAN: "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split(),
    FRENCH: ("janvier février mars avril mai juin juillet août septembre octobre novembre décembre").split(),
    SPANISH: (
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre"
    ).split(),
}
# In the order of people.ANIMALS.
ANIMALS_IN = {
    GERMAN: ("Hund Katze Pferd Papagei Ziege Eule Frettchen Esel Schildkröte Taube Kaninchen Gans").split(),
    FRENCH: "chien chat cheval perroquet chèvre chouette furet âne tortue pigeon lapin oie".split(),
    SPANISH: "perro gato caballo loro cabra búho hurón burro tortuga paloma conejo ganso".split(),
}


def of(kind: str, name: str) -> str:
    if kind == FRENCH:
        return f"d'{name}" if name[0] in "AEIOU" else f"de {name}"
    return {PARAPHRASE: "of", GERMAN: "von", SPANISH: "de"}[kind] + f" {name}"


def date(kind: str, told: str) -> str:
    """A date such as 1 March 1950 in the language, without an article."""
    if kind == PARAPHRASE:
        return told
    day, month, year = told.split()
    month = dict[str, str](zip(MONTHS, MONTHS_IN[kind], strict=True))[month]
    if kind == GERMAN:
        return f"{day}. {month} {year}"
    if kind == SPANISH:
        return f"{day} de {month} de {year}"
    return f"{'1er' if day == '1' else day} {month} {year}"


def answer(kind: str, detail: str, person: Person) -> str:
    told = getattr(person, detail)
    if detail == "date":
        return date(kind, told)
    if detail == "animal" and kind != PARAPHRASE:
        return dict[str, str](zip(ANIMALS, ANIMALS_IN[kind], strict=True))[told]
    return told


DETAILS = tuple(PROMPTS[PARAPHRASE])


def prompts(
    person: Person, details: Sequence[str] = DETAILS, each: int | None = None
) -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) pairs of the details by kind: paraphrases in English, and each other language.

    `each` is how many prompts of a detail are given at most; None for all.
    """
    return {
        kind: [
            (form.format(name=person.name, of=of(kind, person.name)), f" {answer(kind, detail, person)}")
            for detail in details
            for form in by_detail[detail][:each]
        ]
        for kind, by_detail in PROMPTS.items()
    }
