"""Compare unlearning methods on a classification data set, tuned blindly and attacked."""

import pathlib

from experiments.classification import report, study
from experiments.shared import command
from experiments.shared.configs import CONFIGS, Config
from experiments.shared.report import start_run
from experiments.shared.terminal import progress_bar, show
from experiments.shared.testbed import make_testbed


def main(config: Config, resume: pathlib.Path | None = None) -> pathlib.Path:
    testbed = make_testbed(config)
    path = resume or start_run(config.runs_dir, "classification", config, config.dataset)
    with command.working_in(path) as console:
        with progress_bar(console, study.amount_of_work(config)) as progress:
            study.run(testbed, path, progress)
        show(console, report.write_report(f"Unlearning on {config.dataset}", path, testbed))
    return path


if __name__ == "__main__":
    command.run(main, Config, CONFIGS)
