"""How well a stated utility budget is kept and spent, and by which controller."""

import dataclasses
import pathlib
import sys
import time

import numpy as np
import tyro
from rich.console import Console

from experiments.budget import convergence, report, study, utilities
from experiments.classification.bench import make_bench, open_records
from experiments.classification.configs import CONFIGS, FASHION_MNIST
from experiments.classification.report import describe
from experiments.classification.study import saved_task, trained
from experiments.shared.data.images import FASHION_MNIST_DIR
from experiments.shared.report import note_session, saved_config, start_run
from experiments.shared.terminal import progress_bar

BUDGET_OF_CLASSES = 0.2


@dataclasses.dataclass(frozen=True)
class Config:
    """Run EUPMU under a budget over tasks, optimisers, learning rates, schedules and batch sizes.

    Every run is told how many nats the retain loss may rise; the report says what it spent. Other
    controllers, constant weights, exact surgery, one budget for each class and convergence on convex
    problems are measured beside it. Writes tables.md, runs.csv, pictures and report.html to a new
    folder under --runs-dir; about 50 min on two cores, --smoke (digits, a few cells) 1 min.
    """

    smoke: bool = False
    """A few cells on the digits that come with scikit-learn."""

    data_dir: pathlib.Path = FASHION_MNIST_DIR
    """Folder of Fashion-MNIST's four IDX files, gzipped or not."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""

    resume: pathlib.Path | None = None
    """The folder of an interrupted run to continue with that run's settings."""


def main(config: Config) -> pathlib.Path:
    console = Console()
    start = time.perf_counter()
    smoke = saved_config(config.resume, "budget")["smoke"] if config.resume else config.smoke
    scale = study.SMOKE if smoke else study.FULL
    base = CONFIGS["smoke"] if smoke else dataclasses.replace(FASHION_MNIST, data_dir=config.data_dir)
    bench = make_bench(base)
    path = config.resume or start_run(config.runs_dir, "budget", config)
    console.print(f"{path} (interrupted? --resume {path})", soft_wrap=True, highlight=False)
    runs = study.all_runs(scale)
    class_runs = len(utilities.VARIANTS) * len(scale.class_rates) * len(scale.seeds)
    amount = len(runs) + class_runs + len(scale.seeds)
    with open_records(path / "records.jsonl") as records, progress_bar(console, amount) as progress:
        note_session(path)
        tasks = {spec: saved_task(bench, path, spec) for spec in (*scale.tasks, scale.class_task)}
        everything = np.arange(bench.data.train.size)
        originals = trained(bench, path, "original", everything, scale.seeds, progress)
        study.run_all(bench, records, tasks, originals, runs, progress)
        settings = (scale.class_rates, BUDGET_OF_CLASSES, progress)
        utilities.run_all(bench, records, tasks[scale.class_task], originals, *settings)
        console.print("convex problems", highlight=False)
        curves = convergence.run(**scale.convergence)
        sections = report.write_report(
            path, records.by_key, scale, BUDGET_OF_CLASSES, curves, describe(path, bench)
        )
    for section in sections[:1]:
        console.print(section[0].to_markdown(), highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} s. All of it: {path / 'report.html'}", soft_wrap=True)
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m experiments.budget"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
