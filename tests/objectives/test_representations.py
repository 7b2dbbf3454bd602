"""Representation misdirection: the distance from a direction, or from the original's states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import objectives

misdirection = objectives.representation_misdirection


def states(seed=0, shape=(2, 3, 4)):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.usefixtures("x64")
def test_both_losses_by_hand():
    hidden, original, direction = states(), states(1), 6.5 * np.eye(4)[1]
    distance = ((hidden - direction) ** 2).sum(-1)
    np.testing.assert_allclose(misdirection(hidden, direction), distance.mean(-1), rtol=1e-13)
    np.testing.assert_allclose(misdirection(hidden[:, 0], direction), distance[:, 0], rtol=1e-13)
    distance = ((hidden - original) ** 2).sum(-1)
    np.testing.assert_allclose(misdirection(hidden, original), distance.mean(-1), rtol=1e-13)
    np.testing.assert_array_equal(misdirection(hidden, hidden), 0)


@pytest.mark.usefixtures("x64")
def test_gradient_in_closed_form_and_only_where_it_counts():
    hidden, original, direction = states(), states(1), np.arange(4.0)
    mask = np.array([[True, True, False], [False, False, True]])
    for x in (hidden, original):
        x[~mask] = np.nan
    for target in (direction, original):
        found = jax.grad(lambda x, target=target: misdirection(x, target, mask).sum())(hidden)
        expected = 2 * (hidden - target) / mask.sum(-1)[:, None, None]
        np.testing.assert_allclose(found, np.where(mask[..., None], expected, 0), rtol=1e-13)
        assert not np.any(jax.grad(lambda t: misdirection(hidden, t, mask).sum())(jnp.asarray(target)))


def test_a_text_of_which_nothing_counts_is_nan():
    mask = np.array([[False] * 3, [True] * 3])
    np.testing.assert_array_equal(np.isnan(misdirection(states(), np.zeros(4), mask)), [True, False])


@pytest.mark.usefixtures("strict")
def test_narrow_states_are_summed_in_float32():
    hidden = jnp.full((1, 2, 512), 1.0, jnp.bfloat16)
    found = jax.jit(misdirection)(hidden, jnp.zeros(512))
    assert found.dtype == jnp.float32
    assert found.tolist() == [512]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: misdirection(states(), np.zeros(3)), ValueError, r"target must.*\(2, 3, 4\).*got \(3,\)"),
        (lambda: misdirection(states(), states()[0]), ValueError, "target must have the shape"),
        (lambda: misdirection(np.zeros(4), np.zeros(4)), ValueError, r"hidden must.*\[B, T, D\]"),
        (lambda: misdirection(states() > 0, np.zeros(4)), TypeError, "hidden must be floating"),
        (lambda: misdirection(states(), np.zeros(4), np.ones(2, bool)), ValueError, r"mask must.*\(2, 3\)"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
