"""Forget a class, then a random tenth of the training data; compare six methods with retraining."""

import dataclasses
import pathlib
import sys
import time
from typing import Literal

import tyro
from rich.console import Console

from experiments.classification import report, study
from experiments.classification.bench import make_bench
from experiments.classification.configs import CONFIGS
from experiments.shared.data.images import FASHION_MNIST_DIR
from experiments.shared.report import start_run
from experiments.shared.terminal import progress_bar, show


@dataclasses.dataclass(frozen=True)
class Config:
    """Forget a class, then a random tenth of the training data, and compare with retraining.

    Trains a small network, unlearns with a few constant weights, exact surgery and EUPMU, prints a
    table for each task and writes results, plots and report.html to a new folder under --runs-dir.
    The whole comparison, tuned and over seeds: python -m experiments.classification --help
    """

    dataset: Literal["digits", "fashion-mnist"] = "digits"
    """Which images: digits come with scikit-learn, Fashion-MNIST with Debian's dataset-fashion-mnist."""

    data_dir: pathlib.Path = FASHION_MNIST_DIR
    """Folder of Fashion-MNIST's four IDX files, gzipped or not."""

    learning_rate: float = 0.01
    """Of SGD with momentum 0.9, in every method."""

    demand: float = 0.03
    """EUPMU's tolerance is minus this: the retain loss is asked to fall by so much in every step."""

    seed: int = 0
    """Of the data split, the training, the wrong labels and the order of the batches."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


def entries(config: Config) -> dict[str, tuple[str, dict[str, float]]]:
    """Six methods with their knobs."""
    rate = {"learning_rate": config.learning_rate}
    constants = {f"constant {w}": ("random labels", rate | {"weight": w}) for w in (1, 3, 10)}
    demand = rate | {"demand": config.demand}
    return constants | {
        "exact surgery": ("exact surgery", rate | {"demand": 0.0}),
        "EUPMU lookahead": ("EUPMU lookahead", demand),
        "EUPMU lagged": ("EUPMU lagged", demand),
    }


def main(config: Config) -> None:
    console = Console()
    start = time.perf_counter()
    base = CONFIGS[config.dataset]
    study_config = dataclasses.replace(
        base,
        data_dir=config.data_dir,
        tasks=(base.tasks[0], "random:0.1"),
        data_seed=config.seed,
        training_seeds=(config.seed,),
        unlearning_seeds=(config.seed,),
    )
    bench, chosen = make_bench(study_config), entries(config)
    path = start_run(config.runs_dir, f"quickstart-{config.dataset}", config)
    with progress_bar(console, study.amount_of_work(study_config, len(chosen))) as progress:
        study.run_entries(bench, path, progress, chosen)
    sections = report.write_report(f"Quickstart: {config.dataset}", path, bench)
    show(console, sections)
    console.print(f"{time.perf_counter() - start:.0f} s. All of it: {path / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m experiments.quickstart"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
