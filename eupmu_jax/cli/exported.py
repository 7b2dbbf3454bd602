"""A model as two files without Python code: its function as StableHLO, its parameters as safetensors."""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.run.leaves import by_path

FUNCTION, PARAMS = "apply.stablehlo", "params.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
KINDS = (jnp.floating, jnp.integer)
# What jax.export itself puts into plain models. Others may call into the process, even with pointers.
HARMLESS_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "shape_assertion"}


def export_model(
    folder: str | os.PathLike, apply: Callable[[Any, Any], Any], params: Any, inputs: Any
) -> None:
    r"""Writes a model to a folder, for the command line and for any other program.

    .. math:: (\theta, x) \mapsto \text{logits}

    Args:
      folder: made if it does not exist; gets apply.stablehlo and params.safetensors.
      apply: pure function (params, inputs) -> logits [B, C], or [B, T, V]. For NNX:
        ``lambda p, x: nnx.merge(graph, p, rest)(x)``.
      params: pytree of arrays, named by their path: "params.Dense_0.kernel". All that is floating will be
        trained; close over the rest, such as batch statistics:
        ``lambda p, x: model.apply({"params": p, "batch_stats": statistics}, x)``.
      inputs: an array [B, ...]; its first axis may have any length later, the others are fixed.

    Returns:
      None.

    Raises:
      ImportError: flatbuffers or safetensors is missing: the extra "run".
      ValueError: two leaves of the same name; logits of another shape; an apply that cannot be exported for
        a first axis of any length.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> import eupmu_jax as eu
      >>> apply = lambda params, x: x @ params["w"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     eu.export_model(folder, apply, {"w": jnp.ones((3, 2))}, jnp.ones((1, 3)))
      ...     loaded, params = eu.load_model(folder)
      ...     params.keys(), loaded(params, jnp.ones((4, 3))).shape
      (dict_keys(['w']), (4, 2))

    Source: ours, by jax.export.
    """
    from safetensors.flax import save_file

    structure, named = jax.tree.structure(params), by_path(jax.tree.map(jnp.asarray, params))

    def by_name(values, inputs):
        return apply(jax.tree.unflatten(structure, [values[name] for name in named]), inputs)

    inputs = jnp.asarray(inputs)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    try:
        exported = jax.export.export(jax.jit(by_name), platforms=PLATFORMS)(named, shape)
    except Exception as error:
        raise ValueError(f"apply cannot be exported for inputs {shape.shape}: {error}") from error
    out = exported.out_avals[0]
    if len(exported.out_avals) != 1 or len(out.shape) not in (2, 3) or out.shape[0] != batch:
        raise ValueError(
            f"apply must return logits [B, C] or [B, T, V] of inputs [B, ...], got {exported.out_avals}"
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # One derivative, for the gradient.
    (folder / FUNCTION).write_bytes(exported.serialize(vjp_order=1))
    save_file(named, folder / PARAMS)


def load_model(folder: str | os.PathLike) -> tuple[Callable[[Any, Any], jax.Array], dict[str, jax.Array]]:
    """(apply, params) of a folder that `export_model`, or a run of the command line, has written.

    Nothing in the two files can run code of the machine: a function that calls out of XLA is refused.

    Args:
      folder: with apply.stablehlo and params.safetensors.

    Returns:
      apply(params, inputs) -> logits, to be differentiated once and in reverse, and params by name.

    Raises:
      ImportError: flatbuffers or safetensors is missing: the extra "run".
      ValueError: a file that is missing, damaged, or does not go with the other one.

    Example:
      See `export_model`.

      >>> import eupmu_jax as eu
      >>> eu.load_model("/nowhere")
      Traceback (most recent call last):
      ValueError: /nowhere holds no apply.stablehlo: write one with eupmu_jax.export_model

    Source: ours, by jax.export.
    """
    from safetensors.flax import load_file

    folder = pathlib.Path(folder)
    for name in (FUNCTION, PARAMS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: write one with eupmu_jax.export_model")
    try:
        exported = jax.export.deserialize(bytearray((folder / FUNCTION).read_bytes()))
        programs = [exported.mlir_module(), exported.vjp().mlir_module()]
    except Exception as error:
        raise ValueError(f"{folder / FUNCTION} is not a function that jax.export wrote: {error}") from error
    for program in programs:
        called = re.findall(r'custom_call @"?([^"(\s]+)', program)
        if (strange := set(called) - HARMLESS_CALLS) or program.count("custom_call") != len(called):
            raise ValueError(
                f"{folder / FUNCTION} calls {', '.join(sorted(strange)) or 'out'}, which could run any code"
            )
    try:
        params = load_file(folder / PARAMS)
    except Exception as error:
        raise ValueError(f"{folder / PARAMS} cannot be read: {error}") from error
    (wanted, shape), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    check_names(folder / PARAMS, params, wanted)

    def apply(params, inputs):
        inputs = jnp.asarray(inputs)
        # A width is a matter of storage. Integers for floats are not: they may be pixels to be scaled.
        if any(jnp.issubdtype(shape.dtype, kind) and jnp.issubdtype(inputs.dtype, kind) for kind in KINDS):
            inputs = inputs.astype(shape.dtype)
        return exported.call(params, inputs)

    return apply, params


def check_names(path: pathlib.Path, params: Any, wanted: Any) -> None:
    described = lambda tree: {name: f"{leaf.dtype}{tuple(leaf.shape)}" for name, leaf in tree.items()}
    got, wanted = described(params), described(wanted)
    if got != wanted:
        names = sorted(name for name in got | wanted if got.get(name) != wanted.get(name))
        wrong = "; ".join(f"{name}: {got.get(name)}, not {wanted.get(name)}" for name in names)
        raise ValueError(f"{path} does not go with {FUNCTION}: {wrong}")


def logits_in_batches(apply: Any, params: Any, inputs: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """apply(params, inputs) as NumPy, so many rows at a time."""
    parts = [inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size)]
    return np.concatenate([np.asarray(apply(params, part)) for part in parts])
