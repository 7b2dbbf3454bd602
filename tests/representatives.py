"""Which of many cases alike run by default."""

from itertools import product

import pytest


def slow_unless(fast, cases):
    """The fast cases, for parametrize, and the others, which wait for `pytest -m slow`."""
    arguments = lambda case: case if isinstance(case, tuple) else (case,)
    others = [case for case in cases if case not in fast]
    return [*fast, *(pytest.param(*arguments(case), marks=pytest.mark.slow) for case in others)]


def one_or_three(*axes):
    """All combinations of the axes, with one utility and with three in turn."""
    places = product(*map(range, map(len, axes)))
    return [
        (*(axis[i] for axis, i in zip(axes, place, strict=True)), 1 + 2 * (sum(place) % 2))
        for place in places
    ]
