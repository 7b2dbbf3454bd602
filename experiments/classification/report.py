"""What the finished classification study shows beside a comparison: trials, attacks, costs, fixed points."""

import pathlib

import numpy as np
import pandas as pd

from experiments.classification.plots import hypervolume, plot_attack, plot_costs
from experiments.classification.tables import (
    MAIN,
    Results,
    curve_sections,
    front_section,
    more_tables,
    overview,
    read_results,
    task_tables,
)
from experiments.shared.records import RecordsByKey, of_kind
from experiments.shared.report import RETRAIN, Frame, Picture, Section, write_csv
from experiments.shared.report import write_report as write_sections
from experiments.shared.testbed import Testbed


def write_report(title: str, path: pathlib.Path, testbed: Testbed) -> list[Section]:
    """All files of a finished study but its records; returns the sections with the main tables."""
    results = read_results(path, testbed)
    trials = trials_frame(results.records)
    # The cost table has better times: of one task, the best of three.
    columns = MAIN if of_kind(results.records, "cost") else MAIN | {"seconds": 2}
    tables, front = task_tables(results, columns), front_section(path, results, trials)
    if len(trials):
        write_csv(path / "trials.csv", trials, results.origin)
        of_tuning = results.all_runs["training_seed"] == testbed.config.tuning_seed
        front.parts.extend(trial_tables(results.all_runs[of_tuning], trials))
    sections = [overview(results), *tables, front, *curve_sections(path, results), *more_tables(results)]
    sections += [
        *attack_section(path, results),
        *targets_section(results.records),
        *cost_section(path, results),
        *fixed_point_section(results),
    ]
    write_sections(path, title, sections, results.origin)
    return tables


def trials_frame(records: RecordsByKey) -> Frame:
    """One row for each setting tried; `chosen` marks the best of a method and task."""
    rows = []
    for record in of_kind(records, "trial"):
        _, task, method, number = record["key"]
        knobs = {f"knob {name}": value for name, value in record["knobs"].items()}
        scores = {name: record[name] for name in ("UA", "RA", "VA", "TA", "score", "late_multiplier")}
        rows.append({"task": task, "method": method, "trial": number} | knobs | scores)
    frame = pd.DataFrame(rows)
    if len(frame):
        best = frame.groupby(["task", "method"])["score"].idxmin()
        frame["chosen"] = frame.index.isin(list(best))
    return frame


def trial_tables(references: Frame, trials: Frame) -> list[str | Frame]:
    """What each method's trials reach: their front, and the nearest to Retrain of their seed."""
    retrain = references[references["method"] == RETRAIN].set_index("task")
    volumes, nearest = {}, {}
    for (method, task), part in trials.groupby(["method", "task"], sort=False):
        volume = [hypervolume(part[["UA", y]].to_numpy(), retrain.loc[task, "UA"]) for y in ("RA", "TA")]
        volumes.setdefault(method, {})[task] = " / ".join(f"{share:.3f}" for share in volume)
        distances = (part[["UA", "RA", "TA"]] - retrain.loc[task, ["UA", "RA", "TA"]].astype(float)).abs()
        of_chosen = distances[part["chosen"]].mean(axis=1).iloc[0]
        nearest.setdefault(method, {})[task] = f"{distances.mean(axis=1).min():.2f} / {of_chosen:.2f}"
    return [
        "Hypervolume by retain / test accuracy: the share of the square up to Retrain's forget error that a "
        "front dominates; higher is better.",
        pd.DataFrame(volumes).T,
        "Distance to Retrain (mean over UA, RA and TA) of the trial that is nearest to it / of the one that "
        "was chosen without looking at it: the first is what a method can do, the second what its user gets.",
        pd.DataFrame(nearest).T,
    ]


ATTACK = {
    "auc": ("AUC", 3, "area under the curve; Retrain's is .5 but for chance"),
    "accuracy": ("Accuracy", 1, "in percent; Retrain's is 50 but for chance"),
    "tpr_at_1_fpr": ("TPR at 1% FPR", 1, "true positives at 1% false ones, in percent; Retrain's is 1"),
    "worst_tenth": ("Worst tenth", 1, "accuracy on the tenth of the examples that are separated best"),
}
"""Figures of the likelihood-ratio attack: title, decimals, and what each says."""


def attack_section(path: pathlib.Path, results: Results) -> list[Section]:
    """The likelihood-ratio attack, if there was one: a table for each figure, a column for each task."""
    attacked = of_kind(results.records, "likelihood ratio")
    if not attacked:
        return []
    found = pd.DataFrame(
        [record | {"task": record["key"][1], "method": record["key"][2]} for record in attacked]
    )
    parts: list[str | Frame | Picture] = [
        "How well shadow models separate the unlearned from the retrained: lower is better, down to Retrain. "
        "Methods that hardly forget look better here than they are: read it beside the gap."
    ]
    for name, (title, digits, meaning) in ATTACK.items():
        table = found.pivot_table(index="method", columns="task", values=name, sort=False, dropna=False)
        table = table.reindex(found["method"].unique()).rename_axis(index=None, columns=None)
        table["mean"] = table.mean(axis=1, skipna=False)
        shown = table.map(lambda value, d=digits: "-" if np.isnan(value) else f"{value:.{d}f}")
        parts.extend([f"{title}: {meaning}.", shown])
    plot_attack(path / "attack.png", found, results.runs, results.looks)
    parts.insert(1, Picture("attack.png"))
    return [Section("Likelihood-ratio attack (U-LiRA)", parts)]


def targets_section(records: RecordsByKey) -> list[Section]:
    """How good the targets of the unseen confidence were, if there were any."""
    found = pd.DataFrame([record | {"task": record["key"][1]} for record in of_kind(records, "targets")])
    if not len(found):
        return []
    means: Frame = found.drop(columns="key").groupby("task", sort=False).mean()
    shown = pd.DataFrame(
        {
            "doubted by the original, %": means["doubted original"].map("{:.1f}".format),
            "by the targets": means["doubted targets"].map("{:.1f}".format),
            "by Retrain": means["doubted retrain"].map("{:.1f}".format),
            "nats from Retrain, original": means["nats original"].map("{:.2f}".format),
            "nats from Retrain, targets": means["nats targets"].map("{:.2f}".format),
        }
    ).rename_axis(None)
    text = (
        "Confidence of the forget set, mean over training seeds: the share of labels below even odds, and "
        "the Wasserstein distance from Retrain's confidences. A method that meets its targets is still that "
        "far from Retrain."
    )
    return [Section("Targets of the unseen confidence", [text, shown])]


def cost_section(path: pathlib.Path, results: Results) -> list[Section]:
    """Time, work and memory of each method, if they were measured."""
    costs = pd.DataFrame({record["key"][1]: record for record in of_kind(results.records, "cost")}).T
    if not len(costs):
        return []
    costs = costs.drop(columns="key").astype(float)
    first = next(iter(results.by_task.values()))
    retraining = first[first["method"] == RETRAIN]["seconds"].min()
    plot_costs(path / "costs.png", costs, results.looks)
    shown = pd.DataFrame(
        {
            "seconds": costs["seconds"].map("{:.2f}".format),
            "gradients per step": costs["gradients"].map("{:.2f}".format),
            "gradients": costs["total"].map("{:.0f}".format),
            "peak MB": (costs["peak_bytes"] / 1e6).map("{:.2f}".format),
        }
    )
    text = (
        "Time of a run on the first task without compilation, best of three; FLOPs of one step over "
        "those of one gradient of the two losses on its batch, and the same of the whole run; peak "
        f"memory of a step's own buffers. Retraining took {retraining:.2f} s."
    )
    return [Section("Cost", [text, shown, Picture("costs.png")])]


def fixed_point_section(results: Results) -> list[Section]:
    """EUPMU beside the constant weight that its multiplier settled at, at the same learning rate."""
    settled = {
        record["key"][2]: record["fixed_point_of"]
        for record in of_kind(results.records, "run")
        if "fixed_point_of" in record
    }
    if not settled:
        return []
    means = results.runs.pivot_table(index="method", columns="task", values="gap", sort=False)
    rows = {}
    for constant, method in settled.items():
        pairs = zip(means.loc[method], means.loc[constant], strict=True)
        cells = [f"{a:.2f} / {b:.2f}" for a, b in pairs]
        rows[method] = dict(zip(means.columns, cells, strict=True))
    text = (
        "Gap of EUPMU / of the constant weight that equals its mean multiplier in the second half of the "
        "tuned trial, in the same space, at the same learning rate. Lower is better."
    )
    return [Section("EUPMU against its own fixed point", [text, pd.DataFrame(rows).T])]
