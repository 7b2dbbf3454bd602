"""A language model forgets people, and keeps others, its prose and its answers within stated budgets."""

import dataclasses
import pathlib

from experiments.language import report, study, tiny
from experiments.language.fetch import model_path
from experiments.shared import command
from experiments.shared.records import open_records
from experiments.shared.report import note_session, read_origin, start_run, tables_of
from experiments.shared.terminal import progress_bar


@dataclasses.dataclass(frozen=True)
class Config:
    """Implant eight invented people into a language model, and make it forget four of them.

    Three methods from the same model, at the same number of steps; measured beside the model before and a
    reference that never saw the four, then attacked. The default model is SmolLM2-135M-Instruct, which
    `python -m experiments.language.fetch` brings. Writes tables.md, pictures, transcripts and report.html
    to a new folder under --runs-dir, and every model in Hugging Face's form; about 15 min on two cores,
    --all-methods about 40 min, --smoke (small random weights) 1 to 2 min.
    """

    smoke: bool = False
    """A small model of random weights, which needs no download."""

    all_methods: bool = False
    """All nine methods."""

    model: pathlib.Path | None = None
    """A folder of Hugging Face's form or a .gguf file, of the families Llama, Qwen2 and Qwen3."""

    seed: int = 0
    """Of the people and of all batches."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


def main(config: Config, resume: pathlib.Path | None = None) -> pathlib.Path:
    scale = study.SMOKE if config.smoke else study.FULL
    if config.smoke:
        command.compile_fast()
    if config.all_methods:
        scale = scale._replace(methods=tuple(study.METHODS))
    source = config.model or model_path()
    if not config.smoke and not source.exists():
        raise FileNotFoundError(
            f"{source}: no such file: python -m experiments.language.fetch brings the model, or say --model"
        )
    path = resume or start_run(config.runs_dir, "language", config)
    if config.smoke:
        source = tiny.make(path / "tiny", config.seed)
    with command.working_in(path) as console:
        total = study.amount(scale)
        with open_records(path / "records.jsonl") as records, progress_bar(console, total) as progress:
            note_session(path)
            bench = study.make_bench(source, path, scale, config.seed, progress)
            study.run_all(bench, records)
        sections = report.write_report(path, records.by_key, read_origin(path) | {"scale": scale._asdict()})
        for section in sections[:2]:
            console.print(tables_of(section)[0].to_markdown(), highlight=False, soft_wrap=True)
    return path


if __name__ == "__main__":
    command.run(main, Config)
