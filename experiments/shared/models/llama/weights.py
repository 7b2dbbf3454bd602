"""Tensors by Hugging Face's names, one a layer, to the tree of parameters and back."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.shared.models.llama.config import Config
from experiments.shared.models.llama.model import Params, param_shapes
from experiments.shared.models.sharding import shardings


class Tensors(NamedTuple):
    """What a checkpoint's files hold: the shape of each tensor, and how to read one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def names(path: str, layers: int) -> list[str]:
    """Hugging Face's names of a parameter: of `layers.mlp.up_proj.weight` one for each layer."""
    top, _, rest = path.partition(".")
    if top == "layers":
        return [f"model.layers.{layer}.{rest}" for layer in range(layers)]
    return [path if top == "lm_head" else f"model.{path}"]


def assembled(config: Config, tensors: Tensors, dtype: Any = None, mesh: Mesh | None = None) -> Params:
    """The parameters; ValueError for tensors that are missing, unknown or of another shape.

    Args:
      dtype: of all parameters; None for that of the files.
      mesh: where to put them, split as `sharding` says; one parameter at a time is whole on the host.
    """
    wanted, structure = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    keys = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in wanted]
    check(config, tensors, dict(zip(keys, (leaf.shape for _, leaf in wanted), strict=True)))
    places = jax.tree.leaves(shardings(structure.unflatten(keys), mesh)) if mesh else [None] * len(keys)

    def parameter(key, place):
        parts = [tensors.read(name) for name in names(key, config.num_hidden_layers)]
        value = np.stack(parts) if key.startswith("layers.") else parts[0]
        return jax.device_put(value if dtype is None else value.astype(dtype), place)

    return structure.unflatten([parameter(*pair) for pair in zip(keys, places, strict=True)])


def check(config: Config, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {
        name: shape[1:] if key.startswith("layers.") else shape
        for key, shape in shapes.items()
        for name in names(key, config.num_hidden_layers)
    }
    if missing := sorted(expected.keys() - tensors.shapes.keys()):
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    # Old checkpoints hold the frequencies, which follow from the config.
    others = {n for n in tensors.shapes.keys() - expected.keys() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in others:
        others.remove("lm_head.weight")
        if not np.array_equal(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")):
            raise ValueError("tie_word_embeddings is true, but lm_head.weight is not the embedding")
    if others:
        raise ValueError(f"{len(others)} tensors have no place in this model, such as {min(others)}")
    for name, shape in expected.items():
        if tuple(tensors.shapes[name]) != shape:
            raise ValueError(f"{name} has shape {list(tensors.shapes[name])}, the config says {list(shape)}")


def disassembled(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor under Hugging Face's name, one at a time."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        key = jax.tree_util.keystr(path, simple=True, separator=".")
        whole = np.asarray(leaf)
        parts = whole if key.startswith("layers.") else [whole]
        yield from zip(names(key, len(parts)), parts, strict=True)


def floating(name: str, value: np.ndarray) -> np.ndarray:
    """The tensor itself; ValueError for one of integers, as quantised checkpoints have."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {value.dtype}, but only floating-point weights are supported")
    return value
