"""What a finished classification study shows: frames of its records, tables, and pictures."""

import json
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from experiments.classification.bench import Bench, RecordsByKey, of_kind, read_records
from experiments.classification.plots import (
    hypervolume,
    plot_classes,
    plot_costs,
    plot_front,
    plot_histories,
    plot_relearning,
)
from experiments.shared.report import (
    Frame,
    Section,
    mean_and_std,
    plain,
    read_origin,
    styles,
    write_csv,
    write_markdown,
    write_page,
)

MAIN = {"UA": 1, "RA": 1, "TA": 1, "MIA": 1, "gap": 2, "ToW": 3, "over-forgets": 2, "worst class": 1}
MORE = {f"MIA {name}": 1 for name in ("correctness", "entropy", "modified_entropy", "probability")}
MORE |= {"MIA auc": 3, "KL forget": 3, "KL retain": 3, "KL test": 3}
CONSTANT = "constant at "

LEGEND = (
    "UA = 100 - forget accuracy; RA, TA = retain and test accuracy; MIA = share of the forget set that an "
    "attack takes for non-members; gap = mean distance to Retrain in these four, in points; ToW = product "
    "of (1 - distance) of UA, RA and TA; over-forgets = share of runs with UA or MIA more than 5 points "
    "beyond Retrain; worst class = lowest test accuracy of a class that is not forgotten. Nearer to Retrain "
    "is better, higher is not. Mean ± standard deviation over training seeds; - where a run diverged."
)


def runs_frame(records: RecordsByKey) -> Frame:
    """One row for each run."""
    rows = []
    for record in of_kind(records, "run"):
        _, task, method, training_seed, unlearning_seed = record["key"]
        scalars = {name: value for name, value in record.items() if isinstance(value, float | int)}
        of_classes = record.get("per_class", {})
        kept = [of_classes[label] for label in of_classes if task != f"class:{label}"]
        keys = {"task": task, "method": method}
        seeds = {"training_seed": training_seed, "unlearning_seed": unlearning_seed}
        knobs = {f"knob {name}": value for name, value in record.get("knobs", {}).items()}
        rows.append(keys | seeds | scalars | {"worst class": min(kept, default=np.nan)} | knobs)
    return pd.DataFrame(rows)


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


def describe(path: pathlib.Path, bench: Bench) -> dict[str, Any]:
    """Where the results in `path` come from."""
    sizes = {part: examples.size for part, examples in bench.data._asdict().items()}
    of_steps = {"steps": bench.steps, "forget and retain examples per step": bench.config.batch_size}
    origin = read_origin(path)
    del origin["config"]["runs_dir"]  # a place on this machine, and no part of the results
    return origin | of_steps | {"sizes": sizes}


def write_report(title: str, path: pathlib.Path, bench: Bench) -> list[Section]:
    """All files of a finished study but its records; returns the sections with the main tables."""
    records = read_records(path / "records.jsonl")
    all_runs, trials = runs_frame(records), trials_frame(records)
    origin = describe(path, bench)
    write_csv(path / "runs.csv", all_runs, origin)
    results = plain(origin | {"runs": all_runs.to_dict(orient="records")})
    (path / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    runs = all_runs[all_runs["training_seed"].isin(bench.config.training_seeds)]
    if len(trials):
        write_csv(path / "trials.csv", trials, origin)

    methods = [method for method in runs["method"].unique() if not method.startswith(CONSTANT)]
    looks = styles(methods)
    main = {task: part[part["method"].isin(methods)] for task, part in runs.groupby("task", sort=False)}
    # The cost table has better times: of one task, the best of three.
    columns = MAIN if of_kind(records, "cost") else MAIN | {"seconds": 2}
    tables = {task: mean_and_std(part, columns) for task, part in main.items()}
    sections = [overview(main)]
    sections += [Section(f"Forget {task}", table, *caveats(main[task])) for task, table in tables.items()]
    sections[1].append(LEGEND)
    of_tuning = all_runs[all_runs["training_seed"] == bench.config.tuning_seed]
    sections += pictures(path, runs, of_tuning, trials, records, looks)
    sections += [Section(f"More of {task}", mean_and_std(part, MORE)) for task, part in main.items()]
    sections += attack_and_cost(path, runs, records, looks)
    if any(runs["method"].str.startswith(CONSTANT)):
        sections.append(fixed_points(runs))
    write_markdown(path / "tables.md", title, sections, origin)
    write_page(path / "report.html", title, sections, origin)
    return sections[1 : 1 + len(tables)]


def pictures(path, runs, references, trials, records: RecordsByKey, looks) -> list[Section]:
    plot_front(path / "front.png", runs, trials, looks, "RA", "retain accuracy")
    plot_front(path / "front_test.png", runs, trials, looks, "TA", "test accuracy")
    plot_histories(path / "histories.png", records, looks)
    plot_relearning(path / "relearning.png", records, looks)
    parts: list[Any] = ["front.png", "front_test.png"]
    note = "Small marks: the settings tried, on one seed, with a line along their front. Large: the tuned "
    parts.append(note + "methods over all seeds. Beyond Retrain's star to the right is over-forgotten.")
    if len(trials):
        parts += of_trials(references, trials)
    sections = [
        Section("Utility against forgetting", *parts),
        Section("Losses and multiplier", "histories.png"),
    ]
    classes = [task for task in runs["task"].unique() if "class:" in task]
    if classes:
        plot_classes(path / "classes.png", runs, records, classes, looks)
        text = "Test accuracy of each class, less Retrain's, for the methods nearest to Retrain."
        sections.append(Section("Classes", text, "classes.png"))
    text = "Forget accuracy along fine-tuning; a method passes where it rises no faster than Retrain's."
    return [*sections, Section("Relearning", text, "relearning.png")]


def caveats(runs: Frame) -> list[str]:
    """What a task's table cannot show."""
    means = runs.groupby("method")[["UA", "RA", "TA"]].mean()
    spread = means.loc["Original", "RA"] - means.loc["Original", "TA"]
    error = means.loc["Retrain", "UA"]
    if spread >= 5 or error >= 50:
        return []
    return [
        f"The original has almost no generalisation gap here ({spread:.1f} points), so that Retrain itself "
        f"hardly forgets (UA {error:.1f}): this table shows how much damage a method does rather than how "
        "well it forgets."
    ]


def overview(main: dict[str, Frame]) -> Section:
    """Each method's gap on every task."""
    gaps = {task: mean_and_std(part, {"gap": 2})["gap"] for task, part in main.items()}
    text = (
        "Gap: mean distance to Retrain in UA, RA, TA and MIA, in points; lower is better, and what lies "
        "below Retrain with another seed is noise. Every row was tuned by as many trials: a family of "
        "several rows had several chances, so compare rows, not the best of a family."
    )
    return Section("Overview", text, pd.DataFrame(gaps))


def of_trials(references: Frame, trials: Frame) -> list[Any]:
    """Tables of what each method's trials reach: their front, and the nearest to Retrain of their seed."""
    retrain = references[references["method"] == "Retrain"].set_index("task")
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


def attack_and_cost(path, runs, records: RecordsByKey, looks) -> list[Section]:
    sections = []
    attacked = of_kind(records, "likelihood ratio")
    if attacked:
        rows = {
            record["key"][2]: {
                name: "-" if record.get("diverged") else f"{record[name]:.{3 if name == 'auc' else 1}f}"
                for name in ("auc", "accuracy", "tpr_at_1_fpr", "worst_tenth")
            }
            for record in attacked
        }
        text = (
            f"Forget {attacked[0]['key'][1]}: how well shadow models tell the unlearned from the retrained. "
            "Retrain's auc is .5, its accuracy 50% and its true positives 1% but for chance; worst_tenth is "
            "the accuracy on the tenth of the examples that are told best."
        )
        sections.append(Section("Likelihood-ratio attack (U-LiRA)", text, pd.DataFrame(rows).T))
    costs = pd.DataFrame({record["key"][1]: record for record in of_kind(records, "cost")}).T
    if len(costs):
        costs = costs.drop(columns="key").astype(float)
        of_retrain = runs[(runs["method"] == "Retrain") & (runs["task"] == runs["task"].iloc[0])]
        retraining = of_retrain["seconds"].min()
        plot_costs(path / "costs.png", costs, looks)
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
        sections.append(Section("Cost", text, shown, "costs.png"))
    return sections


def fixed_points(runs: Frame) -> Section:
    """EUPMU beside the constant weight that its multiplier settled at, at the same learning rate."""
    means = runs.pivot_table(index="method", columns="task", values="gap", sort=False)
    rows = {}
    for method in means.index[means.index.str.startswith(CONSTANT)]:
        of_eupmu, of_constant = means.loc[method.removeprefix(CONSTANT)], means.loc[method]
        cells = [f"{a:.2f} / {b:.2f}" for a, b in zip(of_eupmu, of_constant, strict=True)]
        rows[method.removeprefix(CONSTANT)] = dict(zip(means.columns, cells, strict=True))
    text = (
        "Gap of EUPMU / of the constant weight that equals its mean multiplier in the second half of the "
        "tuned trial, in the same space, at the same learning rate. Lower is better."
    )
    return Section("EUPMU against its own fixed point", text, pd.DataFrame(rows).T)
