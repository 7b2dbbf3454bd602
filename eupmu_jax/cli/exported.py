"""A model as two files without Python code: its function as StableHLO, its parameters as safetensors."""

import os
import pathlib
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eupmu_jax.method.types import PyTree
from eupmu_jax.run.leaves import by_path

Apply = Callable[[PyTree, ArrayLike], jax.Array]
"""(params, inputs [B, ...]) -> logits [B, C] or [B, T, V]."""

FUNCTION, PARAMS = "apply.stablehlo", "params.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
# Of a batch that is looked at, where a row has few logits and where it has many.
ROWS_AT_ONCE, LOGITS_AT_ONCE = 256, 2**26
KINDS = (jnp.floating, jnp.integer)
# What jax.export itself puts into plain models. Others may call into the process, even with pointers.
HARMLESS_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "shape_assertion"}


def export_model(
    folder: str | os.PathLike,
    # A Linen module's apply may return a tuple, as far as a type checker knows.
    apply: Callable[[PyTree, jax.Array], PyTree],
    params: PyTree,
    inputs: ArrayLike,
) -> None:
    r"""Writes a model to a folder, for the command line and for any other program.

    .. math:: (\theta, x) \mapsto \text{logits}

    Args:
      folder: where apply.stablehlo and params.safetensors go. It is made if it does not exist.
      apply: pure function (params, inputs) -> logits [B, C], or [B, T, V]. For NNX:
        ``lambda p, x: nnx.merge(graph, p, rest)(x)``.
      params: pytree of arrays. Each is named by its path, "params.Dense_0.kernel". Unlearning trains all
        floating ones. Close over the rest, such as batch statistics:
        ``lambda p, x: model.apply({"params": p, "batch_stats": statistics}, x)``.
      inputs: an array [B, ...]. Later inputs may have a first axis of any length; the other axes are fixed.

    Raises:
      ImportError: flatbuffers or safetensors is missing: the extra "run".
      ValueError: two leaves of the same name; logits of another shape; an apply that cannot be exported for
        inputs whose first axis has any length.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> import eupmu_jax as eu
      >>> apply = lambda params, x: x @ params["w"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     eu.export_model(folder, apply, {"w": jnp.ones((3, 2))}, jnp.ones((1, 3)))
      ...     loaded, params = eu.load_model(folder)
      ...     params.keys(), loaded(params, jnp.ones((4, 3))).shape
      (dict_keys(['w']), (4, 2))
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
    if strange := _strange_calls([exported.mlir_module(), exported.vjp().mlir_module()]):
        raise ValueError(
            f"apply calls {strange}, which is not XLA's own and would be refused: compute it beforehand"
        )
    shapes = [logits.shape for logits in exported.out_avals]
    if len(shapes) != 1 or len(shapes[0]) not in (2, 3) or shapes[0][0] != batch:
        raise ValueError(
            f"apply must return logits [B, C] or [B, T, V] of inputs [B, ...], got {exported.out_avals}"
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # One derivative, for the gradient.
    (folder / FUNCTION).write_bytes(exported.serialize(vjp_order=1))
    save_file(named, folder / PARAMS)


def load_model(folder: str | os.PathLike) -> tuple[Apply, dict[str, jax.Array]]:
    """Reads a model from a folder that `export_model`, or a run of the command line, has written.

    The two files cannot run code on the machine: a function that calls out of XLA is refused.

    Args:
      folder: holds apply.stablehlo and params.safetensors.

    Returns:
      (apply, params). ``apply(params, inputs)`` -> logits can be differentiated once, in reverse. params are
      arrays by name.

    Raises:
      ImportError: flatbuffers or safetensors is missing: the extra "run".
      ValueError: a file that is missing, damaged, or does not go with the other one.

    Example:
      See `export_model`.

      >>> import eupmu_jax as eu
      >>> eu.load_model("/nowhere")
      Traceback (most recent call last):
      ValueError: /nowhere holds no apply.stablehlo: write one with eupmu_jax.export_model
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
    if strange := _strange_calls(programs):
        raise ValueError(f"{folder / FUNCTION} calls {strange}, which could run any code")
    try:
        params = load_file(folder / PARAMS)
    except Exception as error:
        raise ValueError(f"{folder / PARAMS} cannot be read: {error}") from error
    (wanted, shape), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    _check_names(folder / PARAMS, params, wanted)

    def apply(params: PyTree, inputs: ArrayLike) -> jax.Array:
        inputs = jnp.asarray(inputs)
        # Another width is only another way to store the numbers. Integers where the model takes floats are an
        # error: they may be pixels that nobody has scaled.
        if any(jnp.issubdtype(shape.dtype, kind) and jnp.issubdtype(inputs.dtype, kind) for kind in KINDS):
            inputs = inputs.astype(shape.dtype)
        return exported.call(params, inputs)

    return apply, params


def _strange_calls(programs: list[str]) -> str:
    """What programs call that JAX does not put into plain models; "" for nothing."""
    strange = set()
    for program in programs:
        called = re.findall(r'custom_call @"?([^"(\s]+)', program)
        strange |= set(called) - HARMLESS_CALLS
        if program.count("custom_call") != len(called):
            strange.add("something without a name")
    return ", ".join(sorted(strange))


def _check_names(
    path: pathlib.Path, params: Mapping[str, jax.Array], wanted: Mapping[str, jax.Array]
) -> None:
    """ValueError that lists each parameter whose name, shape or dtype is not the wanted one."""
    described = lambda tree: {name: f"{leaf.dtype}{tuple(leaf.shape)}" for name, leaf in tree.items()}
    got, expected = described(params), described(wanted)
    if got != expected:
        names = sorted(name for name in got | expected if got.get(name) != expected.get(name))
        wrong = "; ".join(f"{name}: {got.get(name)}, not {expected.get(name)}" for name in names)
        raise ValueError(f"{path} does not go with {FUNCTION}: {wrong}")


def in_batches(
    of_logits: Callable[[jax.Array, Mapping[str, ArrayLike]], PyTree], apply: Apply
) -> Callable[[PyTree, Mapping[str, np.ndarray]], PyTree]:
    """(params, rows) -> of_logits(logits, rows) in NumPy; the logits of all rows of a text fit nowhere."""
    compiled = jax.jit(lambda params, rows: of_logits(apply(params, rows["x"]), rows))

    def whole(params: PyTree, rows: Mapping[str, np.ndarray]) -> PyTree:
        one = jax.eval_shape(apply, params, rows["x"][:1])
        size = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // one.size))
        starts = range(0, len(rows["x"]), size)
        parts = [compiled(params, {key: row[i : i + size] for key, row in rows.items()}) for i in starts]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    return whole
