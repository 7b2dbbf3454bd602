"""The whole table of `python -m tests.lagrangian_parity`."""

import pytest

from tests.lagrangian_parity import SETTINGS
from tests.representatives import slow_unless


@pytest.mark.parametrize(
    ("setting", "utilities"),
    slow_unless([("NNX module", 3)], [(setting, k) for setting in SETTINGS for k in (1, 3)]),
)
def test_equals_implicit_surgery(setting, utilities, x64):
    # optax.MultiSteps sums in float32 unless told otherwise.
    assert SETTINGS[setting](utilities) < (1e-6 if setting.endswith("sums in float32") else 1e-12)
