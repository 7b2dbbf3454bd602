"""Eight host devices for every test; float64 and strictness on demand; compiled fast, and then forgotten."""

import ctypes
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the time goes into compiling small programs, which takes a third of it with the last two. What
# the environment says comes later and wins; where cost is measured, tests/costs.py compiles as users do.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    # Later versions do not have it, and XLA ends the process for a flag that it does not know.
    + ("--xla_cpu_use_fusion_emitters=false " * importlib.metadata.version("jaxlib").startswith("0.10."))
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import pytest


@pytest.fixture
def x64():
    """float64 within one test, float32 by default elsewhere, as users have it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """No implicit promotion of dtypes or ranks; optax's own Adam does not pass this."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Those of one module are of no use to the next, and all together take gigabytes."""
    yield
    jax.clear_caches()
    # glibc keeps what was freed, three quarters of a worker's memory. Other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no core is idle at the end."""
    longest = {
        "test_experiments",
        "test_language",
        "test_layouts",
        "test_processes",
        "test_cli",
        "test_budget",
        "test_conformance",
        "test_unlearning",
    }
    items.sort(key=lambda item: item.path.stem not in longest)
