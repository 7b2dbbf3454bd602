"""The trained models of Fashion-MNIST that come with the results, in half precision.

python -m experiments.diffusion --task fashion-mnist --train
python -m experiments.diffusion.ready runs/diffusion-.../fashion-mnist trousers
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from eupmu_jax.run.files import write_whole
from experiments.shared.models.diffusion.network import Params
from experiments.shared.models.files import load_params, save_params
from experiments.shared.records import Record, read_records
from experiments.shared.report import ORIGINAL, RETRAIN

FOLDER = pathlib.Path(__file__).parent / "results" / "fashion-mnist" / "models"
JUDGE = "judge"
"""The name of the judge's file, beside those of the models."""


def files(concept: str) -> dict[str, pathlib.Path]:
    """Those that there are, by the name of the model; one was trained without the concept."""
    names = {ORIGINAL: ORIGINAL, RETRAIN: f"{RETRAIN}-{concept}", JUDGE: JUDGE}
    found = {name: FOLDER / f"{file}.safetensors" for name, file in names.items()}
    return {name: file for name, file in found.items() if file.exists()}


def read(file: pathlib.Path) -> tuple[Params, Record]:
    """A model, in single precision, and the record of its training."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), load_params(file))
    return params, json.loads(file.with_suffix(".json").read_text())


def write(run: pathlib.Path, concept: str) -> None:
    """Copies the models and records that a run trained."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    records = read_records(run / "records.jsonl")
    for name, key in ((ORIGINAL, ("train", ORIGINAL)), (RETRAIN, ("train", RETRAIN)), (JUDGE, (JUDGE,))):
        to = FOLDER / f"{name}-{concept}.safetensors" if name == RETRAIN else FOLDER / f"{name}.safetensors"
        params = load_params(run / "models" / f"{name}.safetensors")
        save_params(to, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params))
        record = {part: value for part, value in records[key].items() if part != "key"}
        write_whole(to.with_suffix(".json"), json.dumps(record) + "\n")


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), sys.argv[2])
