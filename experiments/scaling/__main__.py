"""Memory, work and communication of a training step on up to 256 TPU chips, without a TPU."""

import dataclasses
import os
import pathlib

# No device is used here, and looking for one takes a minute on a machine that has libtpu.
os.environ["JAX_PLATFORMS"] = "cpu"

from experiments.scaling import report
from experiments.scaling.compile import Cell, measure, prepare
from experiments.scaling.models import MODELS, SMALL, count_parameters
from experiments.scaling.steps import EXACT, METHODS
from experiments.shared import command
from experiments.shared.records import open_records
from experiments.shared.report import note_session, read_origin, start_run, tables_of
from experiments.shared.terminal import progress_bar


def both(cell: Cell) -> list[Cell]:
    """All parameters trained, and adapters."""
    return [cell, cell._replace(lora=True)]


def methods_of(cell: Cell) -> list[str]:
    """Exact surgery of all parameters alone: gradients of adapters take no memory to speak of."""
    return [method for method in METHODS if not (cell.lora and method == EXACT)]


CELLS = [
    *both(Cell("Llama-2-7B", "v5e:4x4", fsdp=4, tensor=4, sequences=1)),
    *both(Cell("Qwen2-7B", "v5e:4x4", fsdp=4, tensor=4, sequences=1)),
    *both(Cell("Llama-3.2-1B", "v5p:2x2x1", fsdp=1, tensor=1, sequences=8, time=512)),
    *both(Cell("Qwen3-1.7B", "v5p:2x2x1", fsdp=1, tensor=1, sequences=8, time=512)),
    *both(Cell("Llama-3.2-1B", "v5e:2x2", fsdp=4, tensor=1, sequences=2, time=512)),
    Cell("Llama-2-70B", "v5e:16x16", fsdp=32, tensor=8, sequences=2),
]
SMALL_CELLS = [Cell("small", "v5e:2x2", fsdp=2, tensor=2, sequences=1, time=128)]


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile unlearning steps of Llama and Qwen decoders, 1B to 70B, for 1 to 256 TPU chips, without a TPU.

    Fine-tuning on one weighted loss, EUPMU with a budget, lagged and look-ahead, and exact surgery, of
    all parameters and of low-rank adapters, with one AdamW, FSDP x tensor parallel, on v5e and v5p: HBM
    per chip, FLOPs, HBM traffic, collectives, and a roofline estimate of a step's time. Needs the extra
    "scaling". Writes tables.md, rows.csv, a picture and report.html to a new folder under --runs-dir,
    anew after each cell; about 50 min on two cores, --smoke (one small model, 4 chips) 1 min.
    """

    smoke: bool = False
    """One small model on one topology."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


def main(config: Config, resume: pathlib.Path | None = None) -> pathlib.Path:
    cells, models = (SMALL_CELLS, SMALL) if config.smoke else (CELLS, MODELS)
    prepare()
    path = resume or start_run(config.runs_dir, "scaling", config)
    amount, sections = sum(len(methods_of(cell)) for cell in cells), []
    with command.working_in(path) as console:
        with open_records(path / "records.jsonl") as records, progress_bar(console, amount) as progress:
            note_session(path)
            for cell in cells:
                shape = models[cell.model]
                for method in methods_of(cell):
                    progress(f"{report.label(cell)}: {method}", 0)
                    parameters = {"parameters": count_parameters(shape)}
                    make = lambda shape=shape, cell=cell, method=method: measure(shape, cell, method)
                    records.get((*cell, method), lambda make=make, p=parameters: make() | p)
                    progress(f"{report.label(cell)}: {method}", 1)
                sections = report.write_report(path, records.by_key, cells, models, read_origin(path))
        console.print(tables_of(sections[0])[0].to_markdown(), highlight=False)
    return path


if __name__ == "__main__":
    command.run(main, Config)
