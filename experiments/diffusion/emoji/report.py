"""The tables and the pictures of the study of emoji."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.diffusion import attacks
from experiments.diffusion.bench import JUDGE
from experiments.diffusion.emoji import study
from experiments.diffusion.emoji.attacking import ATTACKS, PROMPTS, amount_of
from experiments.diffusion.emoji.captions import STYLES, THINGS, UNSEEN, caption_of
from experiments.diffusion.emoji.erasures import CONCEPT, TOGETHER, Erasure
from experiments.diffusion.emoji.gallery import Gallery
from experiments.diffusion.emoji.looking import ALL_KINDS, Looked, judged, looked_at
from experiments.diffusion.emoji.unlearning import RANK
from experiments.diffusion.judge import distance
from experiments.diffusion.measures import in_bytes
from experiments.diffusion.methods import BUDGET_SHARE, HEADLINE
from experiments.diffusion.report import curve, tiled
from experiments.diffusion.tasks import GUIDANCE
from experiments.shared.records import RecordsByKey
from experiments.shared.report import (
    ORIGINAL,
    RETRAIN,
    Frame,
    Origin,
    Picture,
    Section,
    grid,
    tables_of,
)
from experiments.shared.report import write_report as write_sections

SHEETS, EXAMPLES = 4, 4
NAMES = tuple(thing.name for thing in THINGS)


class Real(NamedTuple):
    """Held-out pictures, with those of combinations that nobody was trained on."""

    kinds: np.ndarray
    images: np.ndarray
    features: np.ndarray


def real_of(gallery: Gallery) -> Real:
    parts = gallery.held_out, gallery.unseen
    images = np.concatenate([part.x for part in parts])
    return Real(np.concatenate([part.kinds for part in parts]), images, judged(gallery, images).features)


def right(looked: Looked, rows: np.ndarray) -> float:
    """The share of those samples that show the thing in the style that was asked for."""
    return float((looked.seen == looked.asked).all(-1)[rows].mean())


def models_of(records: RecordsByKey, erasure: Erasure, methods: Sequence[str]) -> dict[str, str]:
    """The models of one table that were looked at, by how they are called there."""
    found = {ORIGINAL: ORIGINAL} | ({RETRAIN: RETRAIN} if erasure == CONCEPT else {})
    found |= {method: study.name_of(erasure, method) for method in methods}
    return {label: name for label, name in found.items() if ("look", name) in records}


def scores(
    erasure: Erasure, looked: Looked, before: Looked, real: Real, held_out: np.ndarray
) -> dict[str, str]:
    """Of one model: the shares of samples, the distances and the losses, by utility."""
    gone, utilities = erasure.matches(looked.asked), erasure.utilities(looked.asked)
    cells = {
        f"still {erasure.title.split(' → ')[0]}": erasure.matches(looked.seen[gone]).mean(),
        "as it is to become": (looked.seen[gone] == erasure.becomes(looked.asked[gone])).all(-1).mean(),
    } | {f"right, {name}": right(looked, rows) for name, rows in utilities.items()}
    of_real, of_held_out = erasure.utilities(real.kinds), erasure.utilities(held_out)
    distances = {
        f"distance, {name}": f"{distance(looked.features[rows], real.features[of_real[name]]):.0f}"
        for name, rows in utilities.items()
    }
    rises = {
        f"loss, {name}": f"{looked.losses[rows].mean() / before.losses[rows].mean() - 1:+.1%}"
        for name, rows in of_held_out.items()
    }
    return {name: f"{value:.3f}" for name, value in cells.items()} | distances | rises


def erasure_table(
    gallery: Gallery, real: Real, records: RecordsByKey, erasure: Erasure, methods: Sequence[str]
) -> Frame:
    folder, held_out = gallery.bench.folder, gallery.held_out.kinds
    before, lines = looked_at(folder, ORIGINAL), {}
    names = models_of(records, erasure, methods)
    for label, name in names.items() if len(names) > 1 else ():
        run = records.get(("unlearn", name), records.get(("train", name), {}))
        seconds = run["cpu_seconds"]
        lines[label] = scores(erasure, looked_at(folder, name), before, real, held_out)
        lines[label] |= {"CPU-seconds": f"{seconds:.0f}" if seconds else "-"}
    return pd.DataFrame.from_dict(lines, orient="index")


def promise_table(records: RecordsByKey) -> Frame:
    """What the runs under budgets measured themselves."""
    lines = {}
    for kind, name in [key for key in records if key[0] in ("unlearn", "adapter")]:
        record = records[kind, name]
        if promise := record.get("promise"):
            of = lambda key, record=record, promise=promise: ", ".join(
                f"{utility} {value:+.2f}"
                for utility, value in zip(
                    record["utilities"], np.array(promise[key]) / np.array(promise["budget"]), strict=True
                )
            )
            lines[name if kind == "unlearn" else f"rank {RANK}, {name}"] = {
                "spent, in budgets": of("rise"),
                "held out: 95% bound, in budgets": of("held_out_bound"),
                "repair steps": promise["repair_steps"],
                "kept": "yes" if promise["holds"] else "no",
            }
    return pd.DataFrame.from_dict(lines, orient="index")


def guidance_table(records: RecordsByKey) -> Frame:
    found = records["agreement", ORIGINAL]["right"]
    columns = "thing", "style", "both"
    return pd.DataFrame.from_dict(
        {
            f"guidance {guidance}": dict(zip(columns, (f"{share:.3f}" for share in shares), strict=True))
            for guidance, shares in found.items()
        },
        orient="index",
    )


def agreement_table(gallery: Gallery) -> Frame:
    """Of the model before, for each thing in each style."""
    looked, lines = looked_at(gallery.bench.folder, ORIGINAL), {}
    for thing, name in enumerate(NAMES):
        of = lambda style, thing=thing: right(looked, (looked.asked == (thing, style)).all(-1))
        mark = lambda style, thing=thing: " (unseen)" if (thing, style) in UNSEEN else ""
        lines[name] = {title: f"{of(style):.2f}{mark(style)}" for style, title in enumerate(STYLES)}
    return pd.DataFrame.from_dict(lines, orient="index")


def shown_as(name: str) -> str:
    return name.removeprefix(f"{CONCEPT.title}, ")


def attacked_of(gallery: Gallery, records: RecordsByKey) -> list[str]:
    """The models that all attacks were tried on."""
    names = study.attacked(gallery.amounts)
    return [name for name in names if all((kind, name) in records for kind in ATTACKS)]


def attack_table(gallery: Gallery, records: RecordsByKey) -> Frame:
    """The share of samples in which the concept is seen, along each attack."""
    lines = {}
    for name in attacked_of(gallery, records):
        of = lambda kind, name=name: curve(records[kind, name]["still"])
        lines[shown_as(name)] = {
            "relearning": of("relearn"),
            "another vector": of("search"),
            f"guidance {', '.join(f'{guidance:g}' for guidance in attacks.GUIDANCES)}": of("guide"),
            f"real, noised to {', '.join(f'{start:g}' for start in attacks.STARTS)}": of("redraw"),
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def caption_table(gallery: Gallery, records: RecordsByKey) -> Frame:
    lines = {}
    for name in attacked_of(gallery, records):
        shares = records["prompt", name]["still"]
        lines[shown_as(name)] = {
            f'"{caption}"': f"{share:.2f}" for caption, share in zip(PROMPTS, shares, strict=True)
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def adapter_table(gallery: Gallery, records: RecordsByKey) -> Frame:
    """What is still drawn of each concept, and how much of all the others is right."""
    lines = {}
    stacks = [study.stack_name(names, scale) for names, scale in study.stacks()]
    found = [name for name in stacks if ("look", name) in records]
    for name in [ORIGINAL, *found] if found else []:
        looked = looked_at(gallery.bench.folder, name)
        gone = [erasure.matches(looked.asked) for erasure in TOGETHER]
        shares = {
            f"still {erasure.title.split(' → ')[0]}": erasure.matches(looked.seen[rows]).mean()
            for erasure, rows in zip(TOGETHER, gone, strict=True)
        }
        shares["all others right"] = right(looked, ~np.any(gone, 0))
        lines[name] = {column: f"{share:.3f}" for column, share in shares.items()}
    return pd.DataFrame.from_dict(lines, orient="index")


def show(axis: Axes, images: np.ndarray, title: str, rows: Sequence[str]) -> None:
    """Images [len(rows) len(STYLES), ...] in a table whose columns are the styles."""
    whole = tiled(images, len(STYLES))
    step = whole.shape[1] / len(STYLES)
    axis.imshow(whole, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_xticks(step * (np.arange(len(STYLES)) + 0.5), STYLES, fontsize=7)
    axis.set_yticks(step * (np.arange(len(rows)) + 0.5), rows, fontsize=7)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def save(figure: Figure, path: pathlib.Path) -> None:
    """In all colours: a palette would tint what is grey."""
    figure.savefig(path, dpi=90)
    plt.close(figure)


def first_of(kinds: np.ndarray, images: np.ndarray, number: int = 0) -> np.ndarray:
    """One image of each thing in each style."""
    return np.stack([images[np.flatnonzero((kinds == kind).all(-1))[number]] for kind in ALL_KINDS])


def sheets_of(path: pathlib.Path, records: RecordsByKey, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Samples of every thing in every style, by title, of the models that were looked at."""
    looked = {title: looked_at(path, name) for title, name in names.items() if ("look", name) in records}
    return {title: first_of(of.asked, of.images) for title, of in looked.items()}


def plot_sheets(path: pathlib.Path, sheets: dict[str, np.ndarray], real: Real | None = None) -> None:
    """Sheets side by side, after one of real pictures."""
    if real is not None:
        sheets = {"real pictures": first_of(real.kinds, in_bytes(real.images))} | sheets
    figure, axes = grid(len(sheets), SHEETS, 2.9, 4.9)
    for axis, (title, images) in zip(axes, sheets.items(), strict=True):
        show(axis, images, title, NAMES)
    save(figure, path)


def plot_concept(path: pathlib.Path, gallery: Gallery, records: RecordsByKey, methods: Sequence[str]) -> None:
    """Samples of the concept in every style, of every model."""
    names = models_of(records, CONCEPT, methods)
    figure, axes = grid(len(names), SHEETS, 2.6, 2.9)
    amount = min(EXAMPLES, gallery.bench.scale.samples)
    for axis, (label, name) in zip(axes, names.items(), strict=True):
        looked = looked_at(gallery.bench.folder, name)
        rows = [first_of(looked.asked, looked.images, number)[: len(STYLES)] for number in range(amount)]
        show(axis, np.concatenate(rows), label, [""] * amount)
    save(figure, path)


def said_of_model(gallery: Gallery, records: RecordsByKey) -> str:
    things, styles = (f"{share:.1%}" for share in records[(JUDGE,)]["right"])
    unseen = ", ".join(f'"{caption_of(*kind)}"' for kind in UNSEEN)
    return (
        f'Captions such as "{caption_of(0, 1)}"; nobody was trained on {unseen}. A classifier, right on '
        f"{things} of the things and {styles} of the styles of held-out pictures, judges samples of 20 DDIM "
        f"steps: {records['agreement', ORIGINAL]['samples']} at each guidance, then "
        f"{gallery.bench.scale.samples} of each thing in each style at guidance {GUIDANCE:g}, as everywhere "
        "below."
    )


def said_of_erasure(gallery: Gallery, erasure: Erasure) -> str:
    asked = np.repeat(ALL_KINDS, gallery.bench.scale.samples, 0)
    counts = {name: int(rows.sum()) for name, rows in erasure.utilities(asked).items()}
    of_each = ", ".join(f"{count} {name}" for name, count in counts.items())
    return (
        f"Shares of {int(erasure.matches(asked).sum())} samples that are asked for what is forgotten, and of "
        f"kept ones ({of_each}). Distances are Frechet's of the classifier's 64 hidden units to real "
        "pictures; of so few samples they say something beside the Original's alone. Losses are the rise "
        "over the Original's, on held-out pictures."
    )


def said_of_attacks(gallery: Gallery) -> str:
    return (
        f"The share of {amount_of(gallery)} samples in which the forgotten thing is seen. Relearning: "
        f"fine-tuning on {attacks.RELEARNED_FROM} of its pictures. Another vector: in place of the sum of "
        "the words, what denoises its coloured pictures best. Both are looked at at the start and four times."
    )


def write_report(gallery: Gallery, records: RecordsByKey, origin: Origin) -> list[Section]:
    """Writes everything that the records of a whole run tell; returns the sections of the report."""
    path, plan = gallery.bench.folder, dict(gallery.amounts.plan)
    real = real_of(gallery)
    of_all = study.stack_name(tuple(erasure.title for erasure in TOGETHER), 1.0)
    sheets = {ORIGINAL: ORIGINAL}
    sheets |= {erasure.title: study.name_of(erasure, HEADLINE) for erasure in plan}
    sheets |= {"three adapters": of_all, "Retrain, without cats": RETRAIN}
    plot_sheets(path / "models.png", sheets_of(path, records, sheets), real)
    called = lambda names, scale: f"all three, scale {scale:g}" if len(names) > 1 else f"{names[0]} alone"
    stacks = {called(*stack): study.stack_name(*stack) for stack in study.stacks()}
    if shown := sheets_of(path, records, stacks):
        plot_sheets(path / "adapters.png", shown)
    plot_concept(path / "concept.png", gallery, records, plan[CONCEPT])
    sections = [
        Section(
            "The model before",
            [
                said_of_model(gallery, records),
                guidance_table(records),
                agreement_table(gallery),
                Picture("models.png"),
            ],
        ),
        *(
            Section(
                erasure.title,
                [
                    said_of_erasure(gallery, erasure),
                    erasure_table(gallery, real, records, erasure, methods),
                    *([Picture("concept.png")] if erasure == CONCEPT else []),
                ],
            )
            for erasure, methods in plan.items()
        ),
        Section(
            "Budgets",
            [
                f"Each utility may lose {BUDGET_SHARE:.0%} of the Original's denoising loss of it. Measured "
                "by the runs themselves, at other noise.",
                promise_table(records),
            ],
        ),
        Section(
            f"Attacks on {CONCEPT.title}",
            [
                said_of_attacks(gallery),
                attack_table(gallery, records),
                "The same by captions that no method was given.",
                caption_table(gallery, records),
            ],
        ),
        Section(
            "Three at once",
            [
                f"Adapters of rank {RANK}, each trained alone under budgets, then added to the original "
                "together.",
                adapter_table(gallery, records),
                Picture("adapters.png"),
            ],
        ),
    ]
    # A run that has not ended tells what it has.
    found = [section for section in sections if all(map(len, tables_of(section)))]
    write_sections(path, "Emoji: forgetting by caption", found, origin)
    return found
