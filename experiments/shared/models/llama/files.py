"""A model from the files it came in, and back into files of Hugging Face's form."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from experiments.shared.models.llama import gguf_file, hugging_face, tokens
from experiments.shared.models.llama.config import Config, to_hugging_face
from experiments.shared.models.llama.model import Params
from experiments.shared.models.llama.weights import assembled, disassembled


class Checkpoint(NamedTuple):
    config: Config
    params: Params


@contextlib.contextmanager
def named(path: pathlib.Path) -> Iterator[None]:
    """Errors within say which file or folder they are about."""
    try:
        yield
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def load(path: pathlib.Path, dtype: Any = None, mesh: Mesh | None = None) -> Checkpoint:
    """A model from a folder of Hugging Face's form, or from a .gguf file.

    Args:
      path: the folder or file.
      dtype: of all parameters; None for that of the files, which is float32 for GGUF.
      mesh: where to put the parameters, split as `sharding` says; None for the default device.

    Raises:
      FileNotFoundError, ValueError: a file is missing, damaged, or of a model that this one cannot be. The
        message names the file and the field or tensor.
    """
    with named(path):
        if path.suffix == ".gguf":
            reader = gguf_file.open_gguf(path)
            config = gguf_file.read_config(reader)
            return Checkpoint(config, assembled(config, gguf_file.read_tensors(reader, config), dtype, mesh))
        config = hugging_face.read_config(path)
        return Checkpoint(config, assembled(config, hugging_face.read_tensors(path), dtype, mesh))


def load_tokenizer(path: pathlib.Path) -> Tokenizer:
    """The tokenizer that lies in the folder or in the .gguf file."""
    with named(path):
        if path.suffix == ".gguf":
            return tokens.gguf_tokenizer(gguf_file.open_gguf(path))
        return tokens.read_tokenizer(path / tokens.TOKENIZER)


def save(
    folder: pathlib.Path,
    config: Config,
    params: Params,
    like: pathlib.Path | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder of Hugging Face's form, whole or not at all.

    Args:
      folder: it must not exist, or be empty.
      config, params: the model.
      like: the folder or .gguf file that it was loaded from: its config.json and all that lies beside the
        weights is copied, of a .gguf file the tokenizer.
      shard_bytes: above this size the weights are written in several files.

    Raises:
      FileExistsError: there is something in the folder.
      ValueError: `like` is of a model of another shape.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: there are files in it, which are not overwritten")
    raw = to_hugging_face(config) if like is None else None
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if like is not None:
        raw = beside(partial, config, like)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    # transformers 5 renamed the field; both read the older name.
    raw = {name: value for name, value in (raw or {}).items() if name != "dtype"} | {"torch_dtype": dtype}
    (partial / hugging_face.CONFIG).write_text(json.dumps(raw, indent=2))
    hugging_face.write_tensors(partial, disassembled(params), shard_bytes)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


def beside(folder: pathlib.Path, config: Config, like: pathlib.Path) -> dict[str, Any]:
    """Writes what `like` holds beside its weights, and returns its config.json."""
    if like.suffix == ".gguf":
        reader = gguf_file.open_gguf(like)
        found = gguf_file.read_config(reader)
        load_tokenizer(like).save(str(folder / tokens.TOKENIZER))
        settings = tokens.gguf_tokenizer_config(reader)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        raw = to_hugging_face(config)
    else:
        found = hugging_face.read_config(like)
        hugging_face.copy_beside(like, folder)
        raw = hugging_face.read_json(like / hugging_face.CONFIG)
    if found != config:
        raise ValueError(f"{like}: the model there has another shape: {found} instead of {config}")
    return raw
