"""What a step costs beside one weighted loss, and beside the peers' own code in the same process."""

import dataclasses
import pathlib

from experiments.benchmarks import growth, models, peers, report, study, whole_runs
from experiments.benchmarks.timing import on_few_cores
from experiments.shared import command
from experiments.shared.records import of_kind, open_records
from experiments.shared.report import note_session, read_origin, start_run, tables_of
from experiments.shared.terminal import progress_bar

WHOLE_RUNS = ("tiny MLP", "MLP", "CNN", "CNN, matmuls")
ROUNDS, SMOKE_ROUNDS = 11, 3


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure steps: FLOPs, bytes, memory, compile time, and wall-clock times that are taken in turn.

    One weighted loss, EUPMU in four forms, the Lagrangian and exact surgery; with the extra "benchmarks"
    also PyTorch, TorchJD and cooper in the same process. On MLPs, a CNN, a DiT and a Llama, on two cores;
    then how costs grow with parameters, utilities, rows and tokens, and `unlearn` against its bare steps.
    Writes tables.md, rows.csv, pictures and report.html to a new folder under --runs-dir; about 15 min on
    two cores, --smoke (one tiny model) 1 min.
    """

    smoke: bool = False
    """One tiny model, few rounds."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


def main(config: Config, resume: pathlib.Path | None = None) -> pathlib.Path:
    made = models.SMOKE if config.smoke else models.MODELS
    axes = growth.SMOKE if config.smoke else growth.AXES
    rounds = SMOKE_ROUNDS if config.smoke else ROUNDS
    runs = [name for name in WHOLE_RUNS if name in made]
    points = [(name, value) for name, axis in axes.items() for value in axis.values]
    path = resume or start_run(config.runs_dir, "benchmarks", config)
    with on_few_cores(), command.working_in(path) as console:
        for package, rows in peers.missing().items():
            console.print(f'no {package} (extra "benchmarks"), so without {", ".join(rows)}', markup=False)
        amount = 8 * len(made) + len(points) + 2 * len(runs)
        with open_records(path / "records.jsonl") as records, progress_bar(console, amount) as progress:
            note_session(path)
            for kind, size in {"model": 8, "run": 2, "growth": 1}.items():
                progress("measured before", size * len(of_kind(records.by_key, kind)))
            for name, make in made.items():
                show = lambda what, part, name=name: progress(f"{name}: {what}", 8 * part)
                records.get(("model", name), lambda make=make, show=show: study.measure(make(), rounds, show))
            for name in runs:
                show = lambda what, part, name=name: progress(f"{name}: {what}", 2 * part)
                run = lambda name=name, show=show: whole_runs.measure(made[name](), rounds, show)
                records.get(("run", name), run)
            for name, value in points:
                point = lambda name=name, value=value: growth.measure(axes[name], value, max(3, rounds // 3))
                if ("growth", name, value) not in records.by_key:
                    records.get(("growth", name, value), point)
                    progress(f"{value:g} {name}", 1)
        origin = read_origin(path)
        del origin["config"]["runs_dir"]  # a place on this machine, and no part of the results
        sections = report.write_report(path, records.by_key, origin)
        console.print(sections[0].parts[0], highlight=False)
        console.print(tables_of(sections[0])[0].to_markdown(), highlight=False)
    return path


if __name__ == "__main__":
    command.run(main, Config)
