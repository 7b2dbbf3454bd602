"""One cell of the study: a step compiled for the chips of a topology that nobody has to own."""

import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.scaling import hlo
from experiments.scaling.flops import flops_of
from experiments.scaling.steps import METHODS, UTILITIES, Batch, initial_parts
from experiments.shared.models.llama.config import Config
from experiments.shared.models.sharding import FSDP, TENSOR, shardings


class Chip(NamedTuple):
    """Published figures: FLOP/s in bfloat16, bytes/s of HBM, bytes of HBM, bytes/s that leave over ICI."""

    flops: float
    hbm_bandwidth: float
    hbm: float
    ici_bandwidth: float


CHIPS = {
    "v5e": Chip(197e12, 819e9, 16e9, 1600e9 / 8),
    "v5p": Chip(459e12, 2765e9, 95e9, 4800e9 / 8),
}
"""docs.cloud.google.com/tpu/docs/v5e and v5p: 1600 and 4800 Gbit/s of interconnect, all links one way."""


class Cell(NamedTuple):
    """A model on a topology.

    Attributes:
      model: its name.
      topology: which chips there are: the first fsdp * tensor of them are used.
      fsdp, tensor: how they are split.
      sequences: texts to forget, and of each set to retain, for each FSDP shard.
      lora: whether adapters are trained in place of all parameters.
      time: tokens that are predicted in each text.
    """

    model: str
    topology: str
    fsdp: int
    tensor: int
    sequences: int
    lora: bool = False
    time: int = 2048

    @property
    def chip(self) -> str:
        return self.topology.split(":")[0]

    @property
    def chips(self) -> int:
        return self.fsdp * self.tensor


def prepare() -> None:
    """The TPU compiler for no TPU: ValueError that says how to install it."""
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('the TPU compiler is missing: pip install -e ".[scaling]" brings libtpu') from None
    # Without these it would look for a TPU, or ask Google's metadata server for one.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-256")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No chip is held that two processes could fight over.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def tpu_mesh(cell: Cell) -> Mesh:
    """The cell's chips as a mesh of "fsdp" by "tensor"."""
    devices = topologies.get_topology_desc(cell.topology, platform="tpu").devices[: cell.chips]
    split = mesh_utils.create_device_mesh((cell.fsdp, cell.tensor), devices, allow_split_physical_axes=True)
    return Mesh(split, (FSDP, TENSOR))


def lowered(config: Config, cell: Cell, mesh: Mesh, method: str) -> tuple[Any, Any]:
    """(the step's Lowered, its Jaxpr), what is trained and the state donated."""
    chosen = METHODS[method](config)
    parts = jax.eval_shape(lambda: initial_parts(config, cell.lora, jax.random.key(0)))
    state = jax.eval_shape(chosen.init, parts.trained)
    shape = cell.fsdp * cell.sequences, 1 + UTILITIES, cell.time + 1
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(parts.frozen, tokens)
    own = shardings(parts.trained, mesh), shardings(state, mesh)
    rows: Any = NamedSharding(mesh, P(FSDP))
    everywhere = NamedSharding(mesh, P())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(
            chosen.step,
            in_shardings=(*own, Batch(shardings(parts.frozen, mesh), rows)),
            out_shardings=(*own, everywhere),
            donate_argnums=(0, 1),
        ).trace(parts.trained, state, batch)
    return traced.lower(), traced.jaxpr.jaxpr


def measure(
    config: Config, cell: Cell, method: str, make_mesh: Callable[[Cell], Mesh] = tpu_mesh
) -> dict[str, Any]:
    """What the compiled step needs per chip; {"error": why} where the compiler refuses."""
    start = time.perf_counter()
    try:
        low, jaxpr = lowered(config, cell, make_mesh(cell), method)
        compiled = low.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return {"error": re.sub(r"\s+", " ", str(error))[:300]}
    memory, traffic = compiled.memory_analysis(), hlo.traffic(hlo.parse(compiled.as_text()), cell.chips)
    found = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "flops": flops_of(jaxpr) / cell.chips,
        "bytes": traffic.hbm,
        "sent": dict(traffic.sent),
        "calls": dict(traffic.calls),
        "compile_seconds": time.perf_counter() - start,
    }
    hbm = found["arguments"] + found["temporaries"] + found["outputs"] - found["aliased"]
    return found | {"hbm": hbm}


def estimated_seconds(chip: Chip, record: dict[str, Any]) -> dict[str, float]:
    """Roofline: the time of each resource at its published peak; a step takes the longest, or more."""
    return {
        "compute": record["flops"] / chip.flops,
        "HBM": record["bytes"] / chip.hbm_bandwidth,
        "ICI": sum(record["sent"].values()) / chip.ici_bandwidth,
    }
