"""A diffusion model forgets a class, and keeps what else it draws within a stated budget."""

import dataclasses
import os
import pathlib
from typing import Literal

from rich.console import Console

from experiments.diffusion import report, study
from experiments.diffusion.bench import make_bench
from experiments.diffusion.emoji import gallery
from experiments.diffusion.emoji import report as report_of_emoji
from experiments.diffusion.emoji import study as study_of_emoji
from experiments.diffusion.tasks import Scale, load_task
from experiments.shared import command
from experiments.shared.records import open_records
from experiments.shared.report import Origin, Section, note_session, read_origin, start_run, tables_of
from experiments.shared.terminal import progress_bar

FAST_COMPILING = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small diffusion model and make it forget a class by drawing another one in its place.

    Methods from the same model, at the same number of steps and rate; measured beside the model before and a
    reference that never saw the class, then attacked; and low-rank adapters that are trained apart and used
    together. Emoji are asked for by caption; a thing, a style and both together are forgotten. Writes
    tables.md, pictures and report.html to a new folder under --runs-dir, and every model as safetensors;
    --smoke (a tiny network) under 2 min.
    """

    task: Literal["digits", "fashion-mnist", "emoji"] = "digits"
    """What is drawn."""

    smoke: bool = False
    """A tiny network, few steps and two methods."""

    seed: int = 0
    """Of the models, of all batches and of all samples."""

    data_dir: pathlib.Path | None = None
    """The folder of the data set, where it has no place of its own."""

    train: bool = False
    """Train the model of emoji, in place of reading the one that comes with the results."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


def main(config: Config, resume: pathlib.Path | None = None) -> pathlib.Path:
    if config.smoke:
        # Nearly all of it is compiling, which takes a third of the time with these.
        os.environ.setdefault("XLA_FLAGS", FAST_COMPILING)
    path = resume or start_run(config.runs_dir, "diffusion", config, config.task)
    with command.working_in(path) as console:
        for section in (run_emoji if config.task == "emoji" else run_classes)(config, path, console):
            console.print(tables_of(section)[0].to_markdown(), highlight=False, soft_wrap=True)
    return path


def run_classes(config: Config, path: pathlib.Path, console: Console) -> list[Section]:
    task = load_task(config.task, config.smoke, config.data_dir)
    with (
        open_records(path / "records.jsonl") as records,
        progress_bar(console, study.amount(task)) as progress,
    ):
        note_session(path)
        study.run_all(make_bench(task, path, config.seed, progress), records)
    return report.write_report(path, task, records.by_key, origin_of(path, task.scale))


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
    return report_of_emoji.write_report(made, records.by_key, origin_of(path, amounts.scale))


def origin_of(path: pathlib.Path, scale: Scale) -> Origin:
    """What made the run, without places on this machine, which are no part of the results."""
    origin = read_origin(path)
    for place in "runs_dir", "data_dir":
        origin["config"].pop(place)
    return origin | {"scale": scale._asdict() | {"recipe": dataclasses.asdict(scale.recipe)}}


if __name__ == "__main__":
    command.run(main, Config)
