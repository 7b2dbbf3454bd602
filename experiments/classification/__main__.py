"""Compare unlearning methods on a classification data set, tuned blindly and attacked."""

import argparse
import pathlib
import sys
import time
from typing import Any

import tyro
from rich.console import Console

from experiments.classification import report, study
from experiments.classification.bench import make_bench
from experiments.classification.configs import CONFIGS, Config
from experiments.shared.models.classifier import Recipe
from experiments.shared.report import saved_config, start_run
from experiments.shared.terminal import progress_bar, show

PROGRAM = "classification"
COMMAND = f"python -m experiments.{PROGRAM}"
USAGE = f"""Compare unlearning methods with retraining: {COMMAND} --config NAME

Every method gets the same number of steps and of trials; its settings are chosen without looking at
Retrain or at the test set; the chosen ones run over several seeds and are attacked. A folder under
--runs-dir receives tables.md, runs.csv, trials.csv, pictures, and report.html that shows it all. A run that
was interrupted continues with --resume FOLDER.

Configurations: {", ".join(CONFIGS)}. --smoke is short for --config smoke. Below are the options of the
chosen configuration, any of which can be overridden."""


def chosen(arguments: list[str]) -> tuple[Config, str, pathlib.Path | None]:
    """The config, its name, and the folder to resume if there is one."""
    parser = argparse.ArgumentParser(prog=COMMAND, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", choices=list(CONFIGS))
    parser.add_argument("--smoke", action="store_const", const="smoke", dest="config")
    parser.add_argument("--resume", type=pathlib.Path)
    known, others = parser.parse_known_args(arguments)
    if known.resume is None or "--help" in others or "-h" in others:
        name = known.config or "digits"
        config = tyro.cli(Config, prog=COMMAND, description=USAGE, default=CONFIGS[name], args=others)
        return config, name, None
    if others or known.config:
        raise ValueError("--resume takes every setting from its folder: leave the other options out")
    return restored(saved_config(known.resume, PROGRAM)), "", known.resume


def restored(values: dict[str, Any]) -> Config:
    """A Config from its JSON form."""

    def fields(part: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in part.items()}

    paths = {name: values[name] and pathlib.Path(values[name]) for name in ("data_dir", "runs_dir")}
    given: dict[str, Any] = fields(values) | paths | {"training": Recipe(**fields(values["training"]))}
    return Config(**given)


def main(arguments: list[str]) -> pathlib.Path:
    console = Console()
    start = time.perf_counter()
    config, name, path = chosen(arguments)
    bench = make_bench(config)
    path = path or start_run(config.runs_dir, f"{PROGRAM}-{name}", config)
    console.print(f"{path} (interrupted? --resume {path})", soft_wrap=True, highlight=False)
    with progress_bar(console, study.amount_of_work(config)) as progress:
        study.run(bench, path, progress)
    sections = report.write_report(f"Unlearning on {config.dataset}", path, bench)
    show(console, sections)
    console.print(f"{time.perf_counter() - start:.0f} s. All of it: {path / 'report.html'}", soft_wrap=True)
    return path


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
