"""Forget a class, then a random tenth of the training data; compare six methods with retraining."""

import dataclasses
import pathlib
from typing import Literal

from experiments.shared import command, comparison
from experiments.shared.comparison import Setting
from experiments.shared.comparison_report import write_report
from experiments.shared.configs import CONFIGS
from experiments.shared.data.images import FASHION_MNIST_DIR
from experiments.shared.report import start_run
from experiments.shared.terminal import progress_bar, show
from experiments.shared.testbed import make_testbed


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


def entries(config: Config) -> dict[str, Setting]:
    """Six methods with their knobs."""
    rate = {"learning_rate": config.learning_rate}
    constants = {f"constant {w}": Setting("random labels", rate | {"weight": w}) for w in (1, 3, 10)}
    demand = rate | {"demand": config.demand}
    return constants | {
        "exact surgery": Setting("exact surgery", rate | {"demand": 0.0}),
        "EUPMU lookahead": Setting("EUPMU lookahead", demand),
        "EUPMU lagged": Setting("EUPMU lagged", demand),
    }


def main(config: Config, resume: pathlib.Path | None = None) -> None:
    base = CONFIGS[config.dataset]
    study_config = dataclasses.replace(
        base,
        data_dir=config.data_dir,
        tasks=(base.tasks[0], "random:0.1"),
        data_seed=config.seed,
        training_seeds=(config.seed,),
        unlearning_seeds=(config.seed,),
    )
    testbed, settings = make_testbed(study_config), entries(config)
    path = resume or start_run(config.runs_dir, "quickstart", config, config.dataset)
    with command.working_in(path) as console:
        with progress_bar(console, comparison.amount_of_work(study_config, len(settings))) as progress:
            comparison.run(testbed, path, progress, settings)
        show(console, write_report(f"Quickstart: {config.dataset}", path, testbed))


if __name__ == "__main__":
    command.run(main, Config)
