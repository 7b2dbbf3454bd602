"""How well a stated utility budget is kept and spent, and by which controller."""

import dataclasses
import pathlib

from experiments.budget import convergence, elsewhere, report, study, utilities
from experiments.shared import command
from experiments.shared.configs import CONFIGS, FASHION_MNIST
from experiments.shared.data.images import FASHION_MNIST_DIR
from experiments.shared.records import open_records
from experiments.shared.report import note_session, start_run, tables_of
from experiments.shared.terminal import progress_bar
from experiments.shared.testbed import describe, make_testbed, original_models, saved_task

BUDGET_OF_CLASSES = 0.2


@dataclasses.dataclass(frozen=True)
class Config:
    """Run EUPMU under a budget over tasks, optimisers, learning rates, schedules and batch sizes.

    Every run has a budget, how many nats the retain loss may rise; its end is measured and brought back
    within the budget, as `unlearn` does, and the report says what it spent. Other controllers, constant
    weights, exact surgery, one budget for each class, another data set, a CNN and convergence on convex
    problems are measured beside it. Writes tables.md, runs.csv, pictures and report.html to a new
    folder under --runs-dir; about 70 min on two cores, --smoke (digits, a few cells) 1 min.
    """

    smoke: bool = False
    """A few cells on the digits that come with scikit-learn."""

    data_dir: pathlib.Path = FASHION_MNIST_DIR
    """Folder of Fashion-MNIST's four IDX files, gzipped or not."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


def main(config: Config, resume: pathlib.Path | None = None) -> pathlib.Path:
    scale = study.SMOKE if config.smoke else study.FULL
    if config.smoke:
        command.compile_fast()
    base = CONFIGS["smoke"] if config.smoke else dataclasses.replace(FASHION_MNIST, data_dir=config.data_dir)
    testbed = make_testbed(base)
    path = resume or start_run(config.runs_dir, "budget", config)
    class_runs = len(utilities.VARIANTS) * len(scale.class_rates) * len(scale.seeds)
    places = elsewhere.SMOKE_PLACES if config.smoke else elsewhere.PLACES
    there = sum(len(elsewhere.runs_of(place)) + 1 for place in places.values())
    amount = len(study.all_runs(scale)) + class_runs + len(scale.seeds) + there
    with command.working_in(path) as console:
        with open_records(path / "records.jsonl") as records, progress_bar(console, amount) as progress:
            note_session(path)
            tasks = {spec: saved_task(testbed, path, spec) for spec in (*scale.tasks, scale.class_task)}
            originals = original_models(testbed, path, scale.seeds, progress)
            study.run_all(testbed, records, tasks, originals, scale, progress)
            class_task, rates = tasks[scale.class_task], scale.class_rates
            utilities.run_all(testbed, records, class_task, originals, rates, BUDGET_OF_CLASSES, progress)
            elsewhere.run_all(path, records, places, config.data_dir, scale, progress)
        console.print("convex problems", highlight=False)
        curves = convergence.run(**scale.convergence)
        origin = describe(path, testbed)
        sections = report.write_report(path, records.by_key, scale, BUDGET_OF_CLASSES, curves, origin)
        console.print(tables_of(sections[0])[0].to_markdown(), highlight=False)
    return path


if __name__ == "__main__":
    command.run(main, Config)
