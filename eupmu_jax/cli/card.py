"""What a page of a run says to whoever has to judge it: a table or text for each question."""

import pathlib
import re
from typing import Any

import numpy as np

from eupmu_jax.cli import page
from eupmu_jax.run.promise import Promise

CHECKSUMS = (
    "A checksum (CRC-32) is of all rows, with dtypes and shapes. The same data gives the same one. "
    "A function has none: what it gave is not recorded."
)
HELD_OUT = (
    "Unseen rows were not trained on. With a probability of 95% the mean rise of all rows like them is below "
    "the bound. A budget is enforced on the rows of the retain set, not there."
)
NOT_HELD_OUT = (
    "The rise was measured on the rows of the retain set. Nothing was measured on rows kept apart from it."
)
QUOTES = "[']"
UNFINISHED = "This run is not finished: what it promised has not been measured."
ATTACK = "taken for unseen"
"""The score of the membership attack of `eupmu evaluate`."""


def asked(run: dict[str, Any], settings: dict[str, Any]) -> list[tuple[str, page.Row]]:
    """What the run was told to do, a line for each setting."""
    constraint = dict(run["constraint"])
    kind = constraint.pop("type")
    bound = "budget: how much the retain loss may rise" if kind == "Budget" else "tolerance: in each step"
    lines = {bound: constraint.get("total" if kind == "Budget" else "eps"), "steps": run["steps"]}
    lines |= {f"rows of a {name} batch": run.get(f"{name}_rows") for name in ("forget", "retain")}
    lines |= {"seed": run.get("seed")}
    # What was asked for and what came of it are the same for these.
    lines |= {
        name: value for name, value in settings.items() if name not in ("budget", "tolerance", "batch_size")
    }
    text = lambda value: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return [
        (name.replace("_", " "), {"value": text(value)}) for name, value in lines.items() if value is not None
    ]


def data(run: dict[str, Any]) -> list[tuple[str, page.Row]]:
    """Of every set, and of the parameters that came in: arrays and checksum."""
    sets = {name: part for name, part in run.items() if re.fullmatch(r"forget|retain(\[.*\])?", name)}
    lines = []
    for name, value in sets.items():
        # Of several processes each has its own rows.
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            who = f"{name}, process {number}" if isinstance(value, list) else name
            if isinstance(part, dict):
                arrays = [
                    f"{key.strip(QUOTES)} {shape}".strip() for key, shape in part.items() if key != "crc32"
                ]
                lines.append((who, {"arrays": "; ".join(arrays), "checksum": f"{part['crc32']:08x}"}))
            else:
                lines.append((who, {"arrays": str(part)}))
    of_params = {
        name: value for name, value in run.items() if name.startswith("crc32 of") and "params" in name
    }
    return lines + [
        (name.removeprefix("crc32 of "), {"checksum": f"{value:08x}"}) for name, value in of_params.items()
    ]


def promised(promise: Promise) -> list[tuple[str, page.Row]]:
    """A line for each utility."""
    columns: dict[str, Any] = {
        "loss before": promise.baseline,
        "allowed rise": promise.budget,
        "measured rise": promise.rise,
        "share of the budget": promise.share,
    }
    if promise.held_out_rise is not None:
        columns |= {"on unseen rows": promise.held_out_rise, "its 95% bound": promise.held_out_bound}
    wide = {name: np.ravel(values) for name, values in columns.items()}
    count = len(wide["share of the budget"])
    return [
        ("retain loss" if count == 1 else f"retain loss {k + 1}", {
            name: float(values[k % len(values)]) for name, values in wide.items()
        })
        for k in range(count)
    ]  # fmt: skip


def caveats(scores: dict[str, Any]) -> list[str]:
    """What a reader must not conclude; each a sentence or two."""
    attacked = any(ATTACK in row for sets in scores.values() for row in sets.values())
    return [
        "A promise is about the mean of the retain loss over the rows that were given. A group within them, "
        "or rows unlike them, may have lost more.",
        "A low score on the forget set does not show that the knowledge is gone. It may come back by "
        "fine-tuning on a few of the forgotten rows, by fewer bits, or by asking in another way. None of "
        "this was tried here.",
        f"The membership attack ({ATTACK}, in percent) is a weak one. A model that was retrained without the "
        "forget set shows what it should give."
        if attacked
        else "No membership attack was run. `eupmu evaluate` runs one where there is a test set.",
        "Whether the right rows were given as the forget set cannot be seen from a run.",
    ]


def reproduced(folder: pathlib.Path, config: dict[str, Any]) -> list[str]:
    """The command, and what ran it."""
    made = config.get("made by", {})
    if not made:
        return [
            page.paragraph(
                "Run eupmu_jax.unlearn with the same functions and the settings of run.json, below."
            )
        ]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    when = f"Made on {made['date']} with {versions}, on {made['device']}, commit {made['commit']}."
    same = "The same versions on the same kind of machine give the same parameters, to the bit."
    command = f"eupmu unlearn {folder.resolve().name}/config.json --folder again"
    return [page.preformatted(command), page.paragraph(f"{when} {same}")]
