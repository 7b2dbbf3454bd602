"""A diffusion model forgets a class, and keeps what else it draws within a stated budget."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal

from rich.console import Console

from experiments.diffusion import report, study
from experiments.diffusion.bench import make_bench
from experiments.diffusion.emoji import gallery
from experiments.diffusion.emoji import report as report_of_emoji
from experiments.diffusion.emoji import study as study_of_emoji
from experiments.diffusion.methods import METHODS
from experiments.diffusion.tasks import Task, load_task
from experiments.shared import command
from experiments.shared.records import open_records
from experiments.shared.report import Origin, Section, note_session, read_origin, start_run, tables_of
from experiments.shared.terminal import progress_bar

BOTH = ("digits", "fashion-mnist")
COST_OF_CLOTHES = 2.5
"""Of a step, in steps of digits, for the time that is left."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small diffusion model and make it forget a class by drawing another one in its place.

    Methods from the same model, at the same number of steps and rate; measured beside the model before and a
    reference that never saw the class, then attacked; and low-rank adapters that are trained apart and used
    together. Emoji are asked for by caption; a thing, a style and both together are forgotten. Writes
    tables.md, pictures and report.html to a new folder under --runs-dir, and every model as safetensors;
    --smoke (digits or emoji, a tiny network) under 2 min.
    """

    task: Literal["both", "digits", "fashion-mnist", "fashion-mnist-shirt", "cifar10", "emoji"] = "both"
    """What is drawn: digits without an 8, Fashion-MNIST without trousers, or without shirts; emoji.
    CIFAR-10 without airplanes, from --data-dir, is for an accelerator."""

    methods: tuple[str, ...] = ()
    """Names of those that run, as in the tables; all when there is none. Not for emoji."""

    train: bool = False
    """Train the models of Fashion-MNIST and of emoji that come with the results, too."""

    smoke: bool = False
    """A tiny network, few steps and two methods."""

    seed: int = 0
    """Of what is trained, of all batches and of all samples."""

    data_dir: pathlib.Path | None = None
    """The folder of CIFAR-10, and of Fashion-MNIST where it has no place of its own."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""

    def __post_init__(self):
        if unknown := set(self.methods) - METHODS.keys():
            known = ", ".join(f'"{name}"' for name in METHODS)
            raise ValueError(f"methods: there is no {', '.join(sorted(unknown))}; there are {known}")


def main(config: Config, resume: pathlib.Path | None = None) -> pathlib.Path:
    if config.smoke:
        command.compile_fast()
    path = resume or start_run(config.runs_dir, "diffusion", config, config.task)
    with command.working_in(path) as console:
        for section in (run_emoji if config.task == "emoji" else run_classes)(config, path, console):
            console.print(tables_of(section)[0].to_markdown(), highlight=False, soft_wrap=True)
    return path


def run_classes(config: Config, path: pathlib.Path, console: Console) -> list[Section]:
    """One task after the other, each in a folder of its own, and a report of both."""
    names = BOTH if config.task == "both" else (config.task,)
    tasks = {name: chosen(config, name) for name in (names[:1] if config.smoke else names)}
    cost = lambda name: 1.0 if name == "digits" else COST_OF_CLOTHES
    total = sum(cost(name) * study.amount(task) for name, task in tasks.items())
    sections: list[Section] = []
    with progress_bar(console, total) as progress:
        note_session(path)
        for name, task in tasks.items():
            folder = path / name
            folder.mkdir(exist_ok=True)
            tell = lambda what, part, name=name: progress(f"{name}: {what}", cost(name) * part)
            with open_records(folder / "records.jsonl") as records:
                study.run_all(make_bench(task, folder, config.seed, tell), records)
                sections += report.sections_of(folder, task, records.by_key)
    report.write_report(path, sections, origin_of(path, tasks))
    return sections


def chosen(config: Config, name: str) -> Task:
    task = load_task(name, config.smoke, config.data_dir)
    scale = task.scale._replace(methods=config.methods or task.scale.methods)
    return task._replace(scale=scale, ready={} if config.train else task.ready)


def run_emoji(config: Config, path: pathlib.Path, console: Console) -> list[Section]:
    amounts = gallery.SMOKE if config.smoke else gallery.FULL
    weights = None if config.train or config.smoke else gallery.WEIGHTS
    font = gallery.FONT if config.data_dir is None else config.data_dir / gallery.FONT.name
    with (
        open_records(path / "records.jsonl") as records,
        progress_bar(console, study_of_emoji.amount(amounts)) as progress,
    ):
        note_session(path)
        made = gallery.make_gallery(path, config.seed, progress, amounts, weights, font)
        study_of_emoji.run_all(made, records)
    return report_of_emoji.write_report(made, records.by_key, origin_of(path, {"emoji": amounts}))


def origin_of(path: pathlib.Path, tasks: Mapping[str, Task | gallery.Amounts]) -> Origin:
    """What made the run, without places on this machine, which are no part of the results."""
    origin = read_origin(path)
    for place in "runs_dir", "data_dir":
        origin["config"].pop(place)
    of = lambda scale: scale._asdict() | {"recipe": dataclasses.asdict(scale.recipe)}
    return origin | {"scale": {name: of(task.scale) for name, task in tasks.items()}}


if __name__ == "__main__":
    command.run(main, Config)
