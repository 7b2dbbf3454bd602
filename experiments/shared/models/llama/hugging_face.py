"""Folders of Hugging Face: config.json, model.safetensors or its shards, and what lies beside them."""

import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments.shared.models.llama.config import Config, from_hugging_face
from experiments.shared.models.llama.weights import Tensors, floating

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(found).__name__}")
    return found


def read_config(folder: pathlib.Path) -> Config:
    path = folder / CONFIG
    try:
        return from_hugging_face(read_json(path))
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def read_tensors(folder: pathlib.Path) -> Tensors:
    """The tensors of model.safetensors, or of the shards that its index names."""
    if (folder / WEIGHTS).exists():
        return open_files([folder / WEIGHTS])
    if not (folder / INDEX).exists():
        raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {INDEX}")
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{folder / INDEX}: weight_map is missing")
    return open_files(folder / name for name in sorted(set(files.values())))


def open_files(paths: Iterable[pathlib.Path]) -> Tensors:
    """The tensors of some .safetensors files."""
    shapes, places = {}, {}
    for path in paths:
        try:
            file = safe_open(path, framework="numpy")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole .safetensors file: {error}") from error
        for name in file.keys():
            shapes[name], places[name] = tuple(file.get_slice(name).get_shape()), file
    return Tensors(shapes, lambda name: floating(name, places[name].get_tensor(name)))


def write_tensors(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """model.safetensors, or shards of at most that many bytes and their index; one shard is in memory."""
    shard, size, total, files = {}, 0, 0, []

    def finish():
        path = folder / f"{len(files)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        files.append((path, list(shard)))

    for name, value in tensors:
        if shard and size + value.nbytes > shard_bytes:
            finish()
            shard, size = {}, 0
        shard[name] = np.ascontiguousarray(value)
        size, total = size + value.nbytes, total + value.nbytes
    finish()
    if len(files) == 1:
        files[0][0].rename(folder / WEIGHTS)
        return
    weight_map = {}
    for i, (path, held) in enumerate(files, start=1):
        target = f"model-{i:05}-of-{len(files):05}.safetensors"
        path.rename(folder / target)
        weight_map |= dict.fromkeys(held, target)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def copy_beside(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies what lies beside the weights: the tokenizer, settings of generation, the licence."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(OTHER_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
