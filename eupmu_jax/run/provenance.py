"""What made a run: the record that belongs beside its results."""

import datetime
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import TypedDict

import jax

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("eupmu_jax", "jax", "jaxlib", "optax", "flax", "numpy")


class Provenance(TypedDict):
    """Versions by package, the devices, the commit of a checkout, and when."""

    versions: dict[str, str]
    device: str
    commit: str
    date: str


def provenance(*more_packages: str) -> Provenance:
    """What runs now, and on what.

    Args:
      more_packages: distributions whose versions count besides those that the package itself needs.

    Returns:
      A dict of plain strings, for JSON.
    """
    packages = (*PACKAGES, *more_packages)
    return {
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "commit": commit(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The checkout's commit, with "-dirty" after it if files differ; "unknown" for an installed package."""
    # An installed package may lie within a checkout of something else.
    if not (ROOT / ".git").exists():
        return "unknown"
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
