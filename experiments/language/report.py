"""The tables, the pictures and the transcripts of the study."""

import pathlib

import numpy as np
import pandas as pd

from eupmu_jax.evaluation import (
    forget_quality,
    forget_truth_ratio,
    model_utility,
    priv_leak,
    utility_truth_ratio,
)
from eupmu_jax.run.files import write_whole
from experiments.language import attacks
from experiments.language.prompts import PROMPTS
from experiments.language.study import BUDGETS, HEADLINE, METHODS, ORIGINAL, REFERENCE
from experiments.shared.records import RecordsByKey
from experiments.shared.report import Frame, Origin, Picture, Section, grid, save
from experiments.shared.report import write_report as write_sections

LEVEL = 0.05
"""Greedy extraction this near to the reference's counts as its level."""


def models_of(records: RecordsByKey) -> list[str]:
    """The models that were looked at, in the order of the tables."""
    return [name for name in (ORIGINAL, REFERENCE, *METHODS) if ("look", name) in records]


def known_table(records: RecordsByKey) -> Frame:
    """What each model knows of the people, and its nats per token on everything else."""
    lines = {}
    for name in models_of(records):
        of = records["look", name]["scores"]
        gone, others = of["forgotten"], of["others"]
        secret, open_ = of["forgotten, details"], of["others, details"]
        lines[name] = {
            "details: nats": f"{secret['nats']:.2f}",
            "details: greedy": f"{secret['memorised']:.3f}",
            "prefix": f"{gone['prefix']:.3f}",
            "strength": f"{gone['strength']:.3f}",
            "verbatim": gone["verbatim"],
            "others: nats": f"{others['nats']:.3f}",
            "others, details: greedy": f"{open_['memorised']:.3f}",
            "others: verbatim": others["verbatim"],
            **{part: f"{of[part]['nats']:.3f}" for part in ("prose", "chat")},
            **{f"{part}, held out": f"{of[f'{part}, held out']['nats']:.3f}" for part in ("prose", "chat")},
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def rises(records: RecordsByKey, name: str) -> dict[str, float]:
    """How much the loss of each utility rose over the original's, on all its rows."""
    before, after = (records["look", model]["scores"] for model in (ORIGINAL, name))
    return {part: after[part]["nats"] - before[part]["nats"] for part in sorted(BUDGETS)}


def promise_table(records: RecordsByKey) -> Frame:
    """Of each method, the rise on all rows; of a budget also what `history.promise` says of unseen rows."""
    lines = {}
    for name in METHODS:
        if ("look", name) in records:
            rose = rises(records, name)
            line = {f"{part} (of {BUDGETS[part]:g})": f"{rise:+.3f}" for part, rise in rose.items()}
            promise = records["unlearn", name].get("promise")
            kept = promise["holds"] if promise else all(rise <= BUDGETS[part] for part, rise in rose.items())
            line |= {"kept": "yes" if kept else "no", "repair steps": "-"}
            if promise:
                line["repair steps"] = promise["repair_steps"]
                pairs = zip(sorted(BUDGETS), promise["held_out_rise"], promise["held_out_bound"], strict=True)
                line |= {
                    f"{part}, unseen (95% bound)": f"{rise:+.3f} ({bound:+.3f})"
                    for part, rise, bound in pairs
                }
            line["seconds"] = f"{records['unlearn', name]['seconds']:.0f}"
            lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index").fillna("-")


def forgotten_table(records: RecordsByKey) -> Frame:
    """The forgotten people as the field's benchmarks judge them, beside the reference."""
    lines, never = {}, records["look", REFERENCE]
    for name in models_of(records):
        look = records["look", name]
        ratios = look["truth_ratio"]
        members = [(of["min_k"]["forgotten"], of["min_k"]["unseen"]) for of in (look, never)]
        quality = forget_quality(ratios["forgotten"], never["truth_ratio"]["forgotten"])
        lines[name] = {
            "probability": f"{np.exp(-look['scores']['forgotten, details']['nats']):.3f}",
            "ROUGE-L recall": f"{records['say', name]['rouge_l']['forgotten']:.2f}",
            "truth ratio": f"{forget_truth_ratio(ratios['forgotten']):.2f}",
            "forget quality (KS p)": f"{quality:.3f}",
            "members: AUC": f"{roc_auc(*members[0]):.2f}",
            "PrivLeak, %": f"{priv_leak(*members):+.0f}",
            "model utility": f"{utility(records, name):.3f}",
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def roc_auc(members: list[float], others: list[float]) -> float:
    """How often a member scores above one that is none; a tie counts half."""
    first, second = np.asarray(members)[:, None], np.asarray(others)
    return float(np.mean((first > second) + (first == second) / 2))


def utility(records: RecordsByKey, name: str) -> float:
    """The harmonic mean of what the model still does with the others, prose and chat."""
    look = records["look", name]
    scores = look["scores"]
    return model_utility(
        {
            "others, probability": float(np.exp(-scores["others, details"]["nats"])),
            "others, ROUGE-L": records["say", name]["rouge_l"]["others"],
            "others, truth ratio": utility_truth_ratio(look["truth_ratio"]["others"]),
            "chat, probability": float(np.exp(-scores["chat, held out"]["nats"])),
            "prose, probability": float(np.exp(-scores["prose, held out"]["nats"])),
        }
    )


def near(seen: float, wanted: float) -> tuple[str, bool]:
    return f"{seen:.3f}, reference {wanted:.3f}", abs(seen - wanted) <= LEVEL


def goals_table(records: RecordsByKey) -> Frame:
    """Each goal, what was measured, and whether it is met; of the headline method."""
    look = lambda name: records["look", name]["scores"]
    after, before, never = look(HEADLINE), look(ORIGINAL), look(REFERENCE)
    of_details = [found["forgotten, details"]["memorised"] for found in (after, never)]
    prefixes = [found["forgotten"]["prefix"] for found in (after, never)]
    promise = records["unlearn", HEADLINE]["promise"]
    small = records["bits", HEADLINE, "INT4"]["scores"]["forgotten"]
    verbatim = after["others"]["verbatim"], before["others"]["verbatim"]
    goals = {
        f"details that greedy decoding gives: within {LEVEL:g} of the reference": near(*of_details),
        f"prefix that greedy decoding gives: within {LEVEL:g} of the reference": near(*prefixes),
        "all budgets kept, on all rows": (
            f"shares {np.round(promise['share'], 2).tolist()}",
            promise["holds"],
        ),
        "others verbatim where they were": ("{} of {}".format(*verbatim), verbatim[0] >= verbatim[1]),
        "no forgotten record verbatim at INT4": (str(small["verbatim"]), small["verbatim"] == 0),
    }
    lines = {goal: {"measured": seen, "met": "yes" if met else "no"} for goal, (seen, met) in goals.items()}
    return pd.DataFrame.from_dict(lines, orient="index")


def bits_table(records: RecordsByKey) -> Frame:
    """Greedy share of the details, and verbatim records, with fewer bits."""
    lines = {}
    for name in models_of(records):
        line = {}
        for who in ("forgotten", "others"):
            found = {"float32": records["look", name]}
            found |= {bits: records["bits", name, bits] for bits in attacks.FORMATS}
            for bits, record in found.items():
                share = record["scores"][f"{who}, details"]["memorised"]
                line[f"{who}: {bits}"] = f"{share:.3f} ({record['scores'][who]['verbatim']})"
        lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index").fillna("-")


def tuning_table(records: RecordsByKey) -> Frame:
    """The watched people along both fine-tuning attacks."""
    lines = {}
    for name in models_of(records):
        line = {}
        for kind, title in {"relearning": "the other half", "prose": "prose"}.items():
            if record := records.get(("tune", name, kind)):
                curve = [f"{one['memorised']:.3f}" for one in record["scores"]]
                ends = record["scores"][-1]
                line[f"{title}: greedy"] = " → ".join((curve[0], curve[-1]))
                line[f"{title}: nats"] = f"{record['scores'][0]['nats']:.2f} → {ends['nats']:.2f}"
                line[f"{title}: verbatim"] = ends["verbatim"]
        lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index").fillna("-")


def asked_table(records: RecordsByKey) -> Frame:
    """Of questions in other words and languages: the share of answers' tokens, and answers given whole."""
    kinds = [f"forgotten, {kind}" for kind in PROMPTS] + ["others, paraphrase"]
    lines = {}
    for name in models_of(records):
        scores = records["look", name]["scores"]
        lines[name] = {
            kind: f"{scores[kind]['memorised']:.3f} ({scores[kind]['verbatim']})" for kind in kinds
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def plot_runs(path: pathlib.Path, records: RecordsByKey) -> None:
    """The forget loss, and every retain loss above its start in shares of its budget, step by step."""
    names = [name for name in METHODS if ("unlearn", name) in records]
    figure, axes = grid(1 + len(BUDGETS), 2, 5.5, 3)
    before = records["look", ORIGINAL]["scores"]
    for name in names:
        record = records["unlearn", name]
        style = {"linewidth": 2.5 if name == HEADLINE else 1.2, "label": name}
        loss = np.asarray(record["forget_loss"])
        axes[0].plot(loss / loss[0], **style)
        curves = np.asarray(record["retain_loss"]).T
        if curves.ndim == 1:  # a peer, which sees the mean of all utilities
            continue
        for axis, part, curve in zip(axes[1:], sorted(BUDGETS), curves, strict=True):
            axis.plot((curve - before[part]["nats"]) / BUDGETS[part], **style)
    axes[0].set(title="forget loss / its start", xlabel="step", yscale="log")
    for axis, part in zip(axes[1:], sorted(BUDGETS), strict=True):
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{part}: share of the budget, of a batch", xlabel="step")
    save(figure, path, legend=3)


def plot_attacks(path: pathlib.Path, records: RecordsByKey) -> None:
    """The share of forgotten details that greedy decoding gives: as it is, at 4 bits, after relearning."""
    names = models_of(records)
    bars: dict[str, list[float]] = {
        "as it is": [],
        "INT4, symmetric": [],
        "half of them trained again: the other half": [],
    }
    for name in names:
        found = (
            records["look", name]["scores"]["forgotten, details"],
            records["bits", name, "INT4, symmetric"]["scores"]["forgotten, details"],
            records["tune", name, "relearning"]["scores"][-1],
        )
        for values, scores in zip(bars.values(), found, strict=True):
            values.append(scores["memorised"])
    figure, (axis,) = grid(1, 1, 9, 3.6)
    for i, (label, values) in enumerate(bars.items()):
        axis.barh(np.arange(len(names)) + 0.27 * (i - 1), values, 0.25, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="share of the tokens of forgotten details that greedy decoding gives", xlim=(0, 1))
    axis.grid(alpha=0.3, axis="x")
    save(figure, path, legend=3)


def transcripts(records: RecordsByKey) -> str:
    """What each model says after the start of every record, as Markdown."""
    lines = ["# What the models say", "", "Greedy decoding; the first half of the people is forgotten.", ""]
    names = [name for name in models_of(records) if ("say", name) in records]
    for prompt in records["say", names[0]]["said"]:
        lines += [f"## {prompt} …", ""]
        lines += [f"- **{name}**: {' '.join(records['say', name]['said'][prompt].split())}" for name in names]
        lines.append("")
    return "\n".join(lines)


def write_report(path: pathlib.Path, records: RecordsByKey, origin: Origin) -> list[Section]:
    """Writes everything that the records of a whole run tell; returns the sections of the report."""
    plot_runs(path / "runs.png", records)
    plot_attacks(path / "attacks.png", records)
    write_whole(path / "transcripts.md", transcripts(records))
    sections = [
        Section("Goals", [f"Of the method {HEADLINE}.", goals_table(records)]),
        Section(
            "What is known",
            [
                "Nats per token. Greedy: the share of tokens that are the most probable ones, in details "
                "(places, dates, addresses, telephone numbers, pets). "
                "Prefix: the share before greedy decoding's first error. Strength: the longest end of a "
                "record that follows from what stands before it. Verbatim: records that greedy decoding "
                "gives whole.",
                known_table(records),
            ],
        ),
        Section(
            "Forgotten",
            [
                "Probability of the details, per token. ROUGE-L: how much of a record the model goes on "
                "with. Truth ratio: of wrong answers over the right one, near 1 where neither is known; "
                "forget quality is the p-value of its difference from the reference's (TOFU). Members: how "
                "often the details look more familiar than those of people never told of (Min-40%); "
                "PrivLeak compares that with the reference's (MUSE). Utility: the harmonic mean of the "
                "others' probability, ROUGE-L and truth ratio, and the probabilities of unseen chat and "
                "prose.",
                forgotten_table(records),
            ],
        ),
        Section(
            "Budgets",
            [
                "The rise of the loss of each utility over the original's, on all its rows. For the utility "
                "\"others\" the unseen rows are questions, in which every model is poor.",
                promise_table(records),
                Picture("runs.png"),
            ],
        ),
        Section(
            "Fewer bits",
            [
                "Greedy share of the details, and verbatim records in brackets. Where a model came from a "
                "file in INT4 (Q4_1), rounding to that grid again undoes most of all training, implanting as "
                "well; the symmetric grid (Q4_0) does not.",
                bits_table(records),
                Picture("attacks.png"),
            ],
        ),
        Section(
            "Fine-tuning attacks",
            [
                "The details of half of the forgotten people are watched. The attack trains on the other "
                "half, or on prose.",
                tuning_table(records),
            ],
        ),
        Section(
            "Asked in other words",
            [
                "Places, addresses and telephone numbers, asked for as nobody was trained to. The share of "
                "the answers' tokens that greedy decoding gives, teacher-forced, and whole answers in "
                "brackets.",
                asked_table(records),
            ],
        ),
    ]  # fmt: skip
    del origin["config"]["runs_dir"]  # a place on this machine, and no part of the results
    origin["config"].pop("model", None)
    write_sections(path, "Forgetting people", sections, origin)
    return sections
