"""Names for what type checkers cannot describe."""

from collections.abc import Sequence
from typing import Any

import chex

PyTree = Any
"""A nest of containers around arrays, whose own type a function keeps or does not look at."""

Numbers = chex.Numeric | Sequence[float]
"""A number for all utilities, or [K], one for each."""
