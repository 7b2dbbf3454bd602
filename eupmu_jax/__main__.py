"""python -m eupmu_jax: the versions and the devices that are here, for a bug report."""

import importlib.metadata
import platform

import jax

# What the package and its extras run on, in the order in which a reader of a bug report asks for them.
PACKAGES = (
    *("eupmu_jax", "jax", "jaxlib", "optax", "flax", "chex", "numpy"),
    *("orbax-checkpoint", "safetensors", "rich", "tyro", "matplotlib", "scikit-learn"),
)


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    rows = {"python": platform.python_version(), "platform": platform.platform()}
    rows |= {package: version_of(package) for package in PACKAGES}
    kinds = [device.device_kind for device in jax.devices()]
    rows["devices"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    for name, value in rows.items():
        print(f"{name:18}{value}")


if __name__ == "__main__":
    main()
