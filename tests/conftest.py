"""Eight host devices for every test; float64 and strictness on demand."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

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


def pytest_collection_modifyitems(items):
    """What takes minutes first, so that no core is idle at the end."""
    slow = ("test_killed_at_any_moment", "test_two_processes")
    items.sort(key=lambda item: not item.name.startswith(slow))
