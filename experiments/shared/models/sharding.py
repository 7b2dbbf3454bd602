"""How parameters and activations are split over a mesh with the axes "fsdp" and "tensor", or one of them."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

FSDP, TENSOR = "fsdp", "tensor"
# Of a matrix [outputs, inputs]: "tensor" splits what is independent, heads, hidden units or words.
BY_OUTPUT, BY_INPUT = P(TENSOR, FSDP), P(FSDP, TENSOR)
MATRICES = {
    **dict.fromkeys(
        ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), BY_OUTPUT
    ),
    **dict.fromkeys(("o_proj", "down_proj"), BY_INPUT),
    # Of diffusion models, a third of each layer; what else they have is small.
    "modulation": BY_OUTPUT,
}


def spec(path: str) -> P:
    """The PartitionSpec of a parameter, `layers.mlp.up_proj.weight`, or of an optimiser's moment of it.

    What is small is replicated.
    """
    *parents, module, kind = ["", *path.split(".")]
    matrix = MATRICES.get(module)
    if matrix is None or kind not in ("weight", "bias"):
        return P()
    split = matrix if kind == "weight" else P(TENSOR) if matrix == BY_OUTPUT else P()
    # The leading axis is that of the layers.
    return P(None, *split) if "layers" in parents and len(split) else split


def shardings(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf."""

    def of(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, P(*present(spec(name), mesh.axis_names)))

    return jax.tree_util.tree_map_with_path(of, params)


def present(spec: Any, axes: Any) -> list[str | None]:
    return [axis if axis in axes else None for axis in spec]


def constrain(x: jax.Array, *spec: str | None) -> jax.Array:
    """`x` with that sharding, along those axes that the mesh has and leaves to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto
    ]
    found = present(spec, axes)
    return jax.lax.with_sharding_constraint(x, P(*found)) if any(found) else x


def gathered(weight: jax.Array, spec: Any) -> jax.Array:
    """A matrix as it is stored, then whole along "fsdp"; its gradient takes the same way back."""
    return constrain(constrain(weight, *spec), *(None if axis == FSDP else axis for axis in spec))
