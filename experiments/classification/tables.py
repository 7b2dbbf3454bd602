"""What a comparison of methods with retraining shows: its tables, and the sections around its pictures."""

import json
import pathlib
from typing import NamedTuple

import pandas as pd

from eupmu_jax.run.files import write_whole
from experiments.classification.plots import (
    Looks,
    plot_classes,
    plot_front,
    plot_histories,
    plot_relearning,
)
from experiments.shared.comparison import runs_frame
from experiments.shared.forget_sets import kind_of
from experiments.shared.records import RecordsByKey, of_kind, read_records
from experiments.shared.report import (
    ORIGINAL,
    RETRAIN,
    Frame,
    Origin,
    Picture,
    Section,
    looks_of,
    mean_and_std,
    plain,
    write_csv,
)
from experiments.shared.testbed import Testbed, describe

MAIN = {"UA": 1, "RA": 1, "TA": 1, "MIA": 1, "gap": 2, "ToW": 3, "over-forgets": 2, "worst class": 1}
MORE = {f"MIA {name}": 1 for name in ("correctness", "entropy", "modified_entropy", "probability")}
MORE |= {"MIA auc": 3, "KL forget": 3, "KL retain": 3, "KL test": 3}
"""Columns of tables, and the decimals of each."""

LEGEND = (
    "UA = 100 - forget accuracy; RA, TA = retain and test accuracy; MIA = share of the forget set that an "
    "attack takes for non-members; gap = mean distance to Retrain in these four, in points; ToW = product "
    "of (1 - distance) of UA, RA and TA; over-forgets = share of runs with UA or MIA more than 5 points "
    "beyond Retrain; worst class = lowest test accuracy of a class that is not forgotten. Nearer to Retrain "
    "is better, higher is not. Mean ± standard deviation over training seeds; - where a run diverged."
)


class Results(NamedTuple):
    """A finished comparison.

    Attributes:
      records: all of it.
      all_runs: one row for each run.
      runs: those on the training seeds that are reported.
      by_task: of these, the runs of the methods that are compared.
      looks: how each of these methods is drawn.
      origin: where the results come from.
    """

    records: RecordsByKey
    all_runs: Frame
    runs: Frame
    by_task: dict[str, Frame]
    looks: Looks
    origin: Origin


def read_results(path: pathlib.Path, testbed: Testbed) -> Results:
    """The results in a run's folder, and runs.csv and results.json of them."""
    records = read_records(path / "records.jsonl")
    origin, all_runs = describe(path, testbed), runs_frame(records)
    write_csv(path / "runs.csv", all_runs, origin)
    results = plain(origin | {"runs": all_runs.to_dict(orient="records")})
    write_whole(path / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")

    runs = all_runs[all_runs["training_seed"].isin(testbed.config.training_seeds)]
    compared = {
        record["key"][2]: record.get("family", "other")
        for record in of_kind(records, "run")
        if "fixed_point_of" not in record
    }
    tasks = runs.groupby("task", sort=False)
    by_task = {task: part[part["method"].isin(list(compared))] for task, part in tasks}
    return Results(records, all_runs, runs, by_task, looks_of(compared), origin)


def overview(results: Results) -> Section:
    """Each method's gap on every task."""
    gaps = {task: mean_and_std(part, {"gap": 2})["gap"] for task, part in results.by_task.items()}
    text = (
        "Gap: mean distance to Retrain in UA, RA, TA and MIA, in points; lower is better, and what lies "
        "below Retrain with another seed is noise. Every row was tuned by as many trials: a family of "
        "several rows had several chances, so compare rows, not the best of a family."
    )
    return Section("Overview", [text, pd.DataFrame(gaps)])


def task_tables(results: Results, columns: dict[str, int]) -> list[Section]:
    """The main table of each task; the legend follows the first."""
    sections = [
        Section(f"Forget {task}", [mean_and_std(part, columns), *caveats(part)])
        for task, part in results.by_task.items()
    ]
    sections[0].parts.append(LEGEND)
    return sections


def more_tables(results: Results) -> list[Section]:
    measured = {name: digits for name, digits in MORE.items() if name in results.runs}
    return [
        Section(f"More of {task}", [mean_and_std(part, measured)]) for task, part in results.by_task.items()
    ]


def caveats(runs: Frame) -> list[str]:
    """What a task's table cannot show."""
    means = runs.groupby("method")[["UA", "RA", "TA"]].mean()
    spread = means.loc[ORIGINAL, "RA"] - means.loc[ORIGINAL, "TA"]
    error = means.loc[RETRAIN, "UA"]
    if spread >= 5 or error >= 50:
        return []
    return [
        f"The original has almost no generalisation gap here ({spread:.1f} points), so that Retrain itself "
        f"hardly forgets (UA {error:.1f}): this table shows how much damage a method does rather than how "
        "well it forgets."
    ]


def front_section(path: pathlib.Path, results: Results, trials: Frame) -> Section:
    """Utility against forgetting, of the methods and of the settings that were tried."""
    plot_front(path / "front.png", results.runs, trials, results.looks, "RA", "retain accuracy")
    plot_front(path / "front_test.png", results.runs, trials, results.looks, "TA", "test accuracy")
    text = (
        "Small marks: the settings tried, on one seed, with a line along their front. Large: the tuned "
        "methods over all seeds. Beyond Retrain's star to the right is over-forgotten."
    )
    return Section("Utility against forgetting", [Picture("front.png"), Picture("front_test.png"), text])


def curve_sections(path: pathlib.Path, results: Results) -> list[Section]:
    """What a run went through, what it left of each class, and how fast it is undone."""
    plot_histories(path / "histories.png", results.records, results.looks)
    sections = [Section("Losses and multiplier", [Picture("histories.png")])]
    classes = [task for task in results.by_task if kind_of(task) in ("class", "subclass")]
    if classes:
        plot_classes(path / "classes.png", results.runs, results.records, classes, results.looks)
        text = "Test accuracy of each class, less Retrain's, for the methods nearest to Retrain."
        sections.append(Section("Classes", [text, Picture("classes.png")]))
    if any("relearning on few" in record for record in of_kind(results.records, "run")):
        plot_relearning(path / "relearning.png", results.records, results.looks)
        text = "Forget accuracy along fine-tuning; a method passes where it rises no faster than Retrain's."
        sections.append(Section("Relearning", [text, Picture("relearning.png")]))
    return sections
