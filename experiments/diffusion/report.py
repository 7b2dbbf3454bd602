"""The tables and the pictures of the study."""

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd

from experiments.diffusion import attacks, study
from experiments.diffusion.bench import JUDGE, file_name
from experiments.diffusion.looks import SHOWN
from experiments.diffusion.methods import BUDGET_SHARE, HEADLINE
from experiments.diffusion.tasks import Task
from experiments.diffusion.unlearning import RANK
from experiments.shared.records import RecordsByKey
from experiments.shared.report import ORIGINAL, RETRAIN, Frame, Origin, Picture, Section, grid, save
from experiments.shared.report import write_report as write_sections


def models_of(task: Task, records: RecordsByKey) -> list[str]:
    """The models that were looked at, in the order of the tables."""
    return [name for name in (ORIGINAL, RETRAIN, *study.methods_of(task)) if ("look", name) in records]


def rise(records: RecordsByKey, record: dict, part: str) -> str:
    """How much the denoising loss of what is kept rose over the original's, of what it was."""
    before = records["look", ORIGINAL]["losses"][f"kept, {part}"]
    return f"{record['losses'][f'kept, {part}'] / before - 1:+.1%}"


def main_table(task: Task, records: RecordsByKey) -> Frame:
    concept, lines = task.concepts[0], {}
    names = task.names[concept.attribute]
    for name in models_of(task, records):
        of = records["look", name]
        run = records.get(("unlearn", name), records.get(("train", name), {}))
        lines[name] = {
            f"still {names[concept.value]}": f"{of['still'][names[concept.value]]:.3f}",
            f"{names[concept.instead]} in its place": f"{of['shares'][concept.instead]:.3f}",
            f"{names[concept.value]} in samples of nothing": f"{of['nothing']:.3f}",
            "others right": f"{of['right']:.3f}",
            **{part: f"{of[part]:.3f}" for part in ("right, near", "right, far") if part in of},
            "feature distance": f"{of['distance']:.1f}",
            "loss of the kept": rise(records, of, "train"),
            "held out": rise(records, of, "held out"),
            "CPU-seconds": f"{run['cpu_seconds']:.0f}",
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def promise_table(task: Task, records: RecordsByKey) -> Frame:
    """What the runs under a budget measured themselves."""
    lines = {}
    for kind, name in [key for key in records if key[0] in ("unlearn", "adapter")]:
        if promise := records[kind, name].get("promise"):
            worst = int(np.argmax(np.ravel(promise["share"])))
            of = lambda key, promise=promise, worst=worst: np.ravel(promise[key])[worst]
            lines[name if kind == "unlearn" else f"rank {RANK}, {name}"] = {
                "budgets": np.size(promise["share"]),
                "share spent, of the worst": f"{of('share'):.3f}",
                "repair steps": promise["repair_steps"],
                "kept": "yes" if promise["holds"] else "no",
                "held out (95% bound), in budgets": (
                    f"{of('held_out_rise') / of('budget'):+.2f} ({of('held_out_bound') / of('budget'):+.2f})"
                ),
            }
    return pd.DataFrame.from_dict(lines, orient="index")


def curve(values: Sequence[float]) -> str:
    return " → ".join(f"{value:.2f}" for value in values)


def attack_table(task: Task, records: RecordsByKey) -> Frame:
    """The share of samples in which the concept is seen, along each attack."""
    lines = {}
    for name in models_of(task, records):
        of = lambda kind, name=name: records[kind, name]["still"]
        lines[name] = {
            "relearning": curve(of("relearn")),
            "another embedding": curve(of("search")),
            f"guidance {', '.join(f'{guidance:g}' for guidance in attacks.GUIDANCES)}": curve(of("guide")),
            f"real, noised to {', '.join(f'{start:g}' for start in attacks.STARTS)}": curve(of("redraw")),
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def adapter_table(task: Task, records: RecordsByKey) -> Frame:
    lines = {}
    stacks = [study.stack_name(names, scale) for names, scale in study.stacks_of(task)]
    for name, of in [(ORIGINAL, records["look", ORIGINAL])] + [(s, records["stack", s]) for s in stacks]:
        lines[name] = {
            **{f"still {concept}": f"{share:.3f}" for concept, share in of["still"].items()},
            "others right": f"{of['right of none']:.3f}",
            "feature distance": f"{of['distance']:.1f}",
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def plot_runs(path: pathlib.Path, task: Task, records: RecordsByKey) -> None:
    """The forget loss, the rise of the retain loss in budgets, and the multiplier, step by step."""
    figure, axes = grid(3, 3, 4.5, 3.2)
    limit = BUDGET_SHARE * records["look", ORIGINAL]["losses"]["kept, train"]
    for number, name in enumerate(study.methods_of(task)):
        record = records["unlearn", name]
        style = {"linewidth": 2.5 if name == HEADLINE else 1.2, "label": name}
        style["color"] = matplotlib.colormaps["tab20"](number)
        mean = lambda key, record=record: np.asarray(record[key], float).reshape(len(record[key]), -1)
        axes[0].plot(mean("forget_loss").mean(1), **style)
        axes[2].plot(mean("multiplier").sum(1), **style)
        # Of others it is the loss itself, whose noise hides its rise.
        if name not in study.peers_of(task):
            axes[1].plot(mean("retain_loss").mean(1) / limit, **style)
    axes[1].axhline(1, color="black", linewidth=0.8)
    axes[0].set(title="forget loss", xlabel="step", yscale="log")
    axes[1].set(title="rise of the retain loss, in budgets, of a batch", xlabel="step")
    axes[2].set(title="multiplier, of all utilities", xlabel="step", yscale="log")
    save(figure, path, legend=4)


def samples(path: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(path / "samples" / file_name(name, ".npz")))


def tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [N, H, W, C] as one, in rows of so many, a pixel of white between them; [H', W', C]."""
    images = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    amount, height, width, channels = images.shape
    tiles = images.reshape(amount // columns, columns, height, width, channels)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(-1, columns * width, channels)


def show(axis, images: np.ndarray, title: str, columns: int = SHOWN) -> None:
    whole = tiled(images, columns)
    axis.imshow(whole.squeeze(-1) if whole.shape[-1] == 1 else whole, cmap="gray", interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def plot_concept(path: pathlib.Path, task: Task, records: RecordsByKey) -> None:
    """Samples of the concept, of every model."""
    names = models_of(task, records)
    found = [samples(path, name)["gone"] for name in names]
    figure, axes = grid(len(names), 3, 3.2, 0.3 + 3.2 * len(found[0]) / SHOWN**2)
    for axis, name, images in zip(axes, names, found, strict=True):
        show(axis, images, name)
    save(figure, path / "concept.png")


def plot_kept(path: pathlib.Path, task: Task, records: RecordsByKey) -> None:
    """Samples of what is kept, of the model before, one method and the reference."""
    methods = study.methods_of(task)
    shown = HEADLINE if HEADLINE in methods else methods[0]
    names = [name for name in (ORIGINAL, shown, RETRAIN) if ("look", name) in records]
    found = [samples(path, name)["others"] for name in names]
    figure, axes = grid(len(names), 3, 3.2, 0.3 + 3.2 * len(found[0]) / SHOWN**2)
    for axis, name, images in zip(axes, names, found, strict=True):
        show(axis, images, name)
    save(figure, path / "kept.png")


def sections_of(path: pathlib.Path, task: Task, records: RecordsByKey) -> list[Section]:
    """Draws the pictures into a task's folder, within that of the run, and tells all that is recorded."""
    concept = task.concepts[0]
    names = task.names[concept.attribute]
    plot_runs(path / "runs.png", task, records)
    plot_concept(path, task, records)
    plot_kept(path, task, records)
    picture = lambda file: Picture(f"{path.name}/{file}")
    judged = records[(JUDGE,)]["right"]
    sections = [
        Section(
            f"{task.title}: {names[concept.value]} becomes {names[concept.instead]}",
            [
                f"Shares of samples at guidance {task.scale.guidance:g} in which a classifier sees what is "
                f"said; it is right on {judged:.1%} of held-out pictures. The feature distance is Frechet's, "
                "of kept samples to real pictures. Losses are the rise of the mean denoising loss over that "
                "of the original at the same noise, of pictures without the concept.",
                main_table(task, records),
                picture("concept.png"),
                picture("kept.png"),
            ],
        ),
        Section(
            f"{task.title}: budgets",
            [
                f"A budget is {BUDGET_SHARE:.0%} of the original's denoising loss of what is kept. It is "
                "measured by the run itself, at other noise.",
                promise_table(task, records),
                picture("runs.png"),
            ],
        ),
        Section(
            f"{task.title}: attacks",
            [
                "The share of samples with the concept. Relearning: fine-tuning on "
                f"{attacks.RELEARNED_FROM} of its pictures, looked at four times. Another embedding: what "
                "denoises all of its pictures best, searched for from its label's own.",
                attack_table(task, records),
            ],
        ),
    ]  # fmt: skip
    if study.adapted_of(task):
        text = (
            f"Of rank {RANK}, each trained alone under a budget, then added to the original together. "
            "The real pictures of the distance still have what the second one forgets."
        )
        sections.append(Section(f"{task.title}: adapters", [text, adapter_table(task, records)]))
    return sections


def write_report(path: pathlib.Path, sections: list[Section], origin: Origin) -> None:
    write_sections(path, "A diffusion model forgets what it draws", sections, origin)
