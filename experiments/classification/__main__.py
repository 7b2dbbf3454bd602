"""Compare unlearning methods on a classification data set, tuned blindly and attacked."""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.classification import report, study
from experiments.classification.configs import CONFIGS, Config
from experiments.classifier import Recipe
from experiments.report import new_run_dir, plain

PROGRAM = "python -m experiments.classification"
USAGE = f"""Compare unlearning methods with retraining: {PROGRAM} --config NAME

Every method gets the same number of steps and of trials; its settings are chosen without looking at
Retrain or at the test set; the chosen ones run over several seeds and are attacked. A folder under
--runs-dir receives tables.md, runs.csv, trials.csv, pictures, and report.html that shows it all. A run that
was interrupted continues with --resume FOLDER.

Configurations: {", ".join(CONFIGS)}. --smoke is short for --config smoke. Below are the options of the
chosen configuration, any of which can be overridden."""


def chosen(arguments: list[str]) -> tuple[Config, str, pathlib.Path | None]:
    """The config, its name, and the folder to resume."""
    parser = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", choices=list(CONFIGS), default="digits")
    parser.add_argument("--smoke", action="store_const", const="smoke", dest="config")
    parser.add_argument("--resume", type=pathlib.Path)
    known, others = parser.parse_known_args(arguments)
    if known.resume is None or "--help" in others or "-h" in others:
        default = CONFIGS[known.config]
        return (
            tyro.cli(Config, prog=PROGRAM, description=USAGE, default=default, args=others),
            known.config,
            None,
        )
    if others:
        raise ValueError(f"--resume takes every setting from its folder; leave out {' '.join(others)}")
    saved = json.loads((known.resume / "config.json").read_text())
    return restored(saved["config"]), saved["name"], known.resume


def restored(values: dict[str, Any]) -> Config:
    """A Config from its JSON form."""

    def fields(part: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in part.items()}

    paths = {name: values[name] and pathlib.Path(values[name]) for name in ("data_dir", "runs_dir")}
    given: dict[str, Any] = fields(values) | paths | {"training": Recipe(**fields(values["training"]))}
    return Config(**given)


def run_with_progress(console: Console, config: Config, path: pathlib.Path, **options) -> study.Bench:
    """study.run under a progress bar, or a line now and then where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = console.is_terminal
    last = 0.0
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=study.amount_of_work(config, options.get("entries")))

        def progress(what: str, part: float) -> None:
            nonlocal last
            bar.update(task, description=escape(what), advance=part)
            if not shown and time.monotonic() - last > 30:
                last = time.monotonic()
                done = bar.tasks[0]
                console.print(f"{done.percentage:3.0f}% {escape(what)}", highlight=False)

        return study.run(config, path, progress, **options)


def show(console: Console, tables: dict[str, Any]) -> None:
    """The main tables in the terminal."""
    for task, frame in tables.items():
        out = Table(title=f"forget {task}", title_justify="left")
        out.add_column("method", no_wrap=True)
        frame = frame[["UA", "RA", "TA", "MIA", "gap"]]
        for name in frame.columns:
            out.add_column(name, justify="right")
        for method, cells in frame.iterrows():
            out.add_row(escape(str(method)), *cells)
        console.print(out)


def main(arguments: list[str]) -> pathlib.Path:
    console = Console()
    start = time.perf_counter()
    config, name, path = chosen(arguments)
    if path is None:
        path = new_run_dir(config.runs_dir, f"classification-{name}")
        saved = {"name": name, "config": plain(dataclasses.asdict(config))}
        (path / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
    console.print(f"{path} (interrupted? --resume {path})", soft_wrap=True, highlight=False)
    bench = run_with_progress(console, config, path)
    tables = report.write_report(f"Unlearning on {config.dataset}", path, bench, time.perf_counter() - start)
    show(console, tables)
    console.print(report.LEGEND, highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} s. All of it: {path / 'report.html'}", soft_wrap=True)
    return path


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
