"""Which of many cases alike run by default."""

import pytest


def slow_unless(fast, cases):
    """The cases, for parametrize, of which all but the fast ones wait for `pytest -m slow`."""
    assert set(fast) <= set(cases)
    arguments = lambda case: case if isinstance(case, tuple) else (case,)
    return [
        case if case in fast else pytest.param(*arguments(case), marks=pytest.mark.slow) for case in cases
    ]
