"""Which of the peers can be measured here: they need the extra "benchmarks", which the JAX rows do not."""

from importlib.util import find_spec

from experiments.benchmarks.models import Model
from experiments.benchmarks.timing import Block

TORCH_FLOOR = "PyTorch: linear scalarisation"
TORCH_LAGGED, TORCH_LOOKAHEAD = "PyTorch: EUPMU lagged", "PyTorch: EUPMU look-ahead"
COOPER = "cooper: Lagrangian"
AGGREGATORS = {"TorchJD: UPGrad": "UPGrad", "TorchJD: PCGrad": "PCGrad", "TorchJD: PCD": "PCD"}
NEEDS = {
    "torch": (TORCH_FLOOR, TORCH_LAGGED, TORCH_LOOKAHEAD),
    "torchjd": tuple(AGGREGATORS),
    "cooper": (COOPER,),
}
"""Which package each row needs."""


def missing() -> dict[str, tuple[str, ...]]:
    """The rows that cannot be measured here, by the package that they lack."""
    has_torch = find_spec("torch") is not None
    return {
        package: names
        for package, names in NEEDS.items()
        if not (has_torch and find_spec(package) is not None)
    }


def blocks_of(model: Model) -> dict[str, Block]:
    """The rows whose packages are here, by name."""
    lacking = {name for names in missing().values() for name in names}
    if lacking >= set(NEEDS["torch"]):
        return {}
    from experiments.benchmarks import torch_steps

    return torch_steps.blocks_of(model, lacking)
