"""A nested dict of arrays in one safetensors file, under names such as "layers.mlp.weight"."""

import pathlib
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
from safetensors.flax import load, save

from eupmu_jax.run.files import write_whole


def save_params(path: pathlib.Path, params: dict[str, Any]) -> None:
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    write_whole(path, save({name: jnp.asarray(leaf) for name, leaf in flat.items()}))


def load_params(path: pathlib.Path) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(load(path.read_bytes()), sep=".")
