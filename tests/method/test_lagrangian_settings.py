"""The whole table of `python -m tests.lagrangian_parity`."""

import pytest

from tests.lagrangian_parity import SETTINGS
from tests.representatives import one_or_three, slow_unless


@pytest.mark.parametrize(
    ("setting", "utilities"),
    slow_unless([("NNX module", 3)], one_or_three(list(SETTINGS))),
)
def test_equals_implicit_surgery(setting, utilities, x64):
    # optax.MultiSteps sums in float32 unless told otherwise.
    assert SETTINGS[setting](utilities) < (1e-6 if setting.endswith("sums in float32") else 1e-12)
