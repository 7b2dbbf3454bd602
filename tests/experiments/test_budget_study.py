"""The budget study's own pieces: the controllers it compares, its losses, and how it counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from experiments.budget import controllers, convergence, report, study, utilities
from experiments.shared.data.images import Examples
from experiments.shared.loop import make_plan, momentum
from experiments.shared.methods import Batch


def follow(rule, observations):
    state, seen = rule.init(), []
    for y in observations:
        multiplier, state = rule.update(state, jnp.float32(y), jnp.float32(1))
        seen.append(float(multiplier))
    return seen


def test_rules_by_hand():
    """A share of the budget of 2 twice: what each rule that has no noise filter of its own makes of it."""
    ascent = follow(controllers.dual_ascent(optax.sgd(0.1)), [2, 2])
    np.testing.assert_allclose(ascent, [1.1, 1.2], rtol=1e-6)
    integral = follow(controllers.proportional_integral(), [2, 2])
    np.testing.assert_allclose(integral, [1 + 0.1 + 0.03, 1 + 0.19 + 0.06], rtol=1e-6)
    # The average of 2 with the start at 0 is 0.4, then 0.72.
    powers = follow(controllers.multiplicative(), [2, 2])
    np.testing.assert_allclose(np.log(powers), [-0.06, -0.06 - 0.028], rtol=1e-5)
    fixed = follow(controllers.fixed_gains(), [2])
    np.testing.assert_allclose(np.log(fixed), [3 * -0.6 + 0.1 * -0.6 + 10 * 0.4], rtol=1e-5)
    frozen = follow(controllers.secant(), [1, 1, 1])
    assert all(multiplier < 1 for multiplier in frozen)
    assert follow(controllers.barrier(), [5.0])[0] > 1


def test_the_packaged_rule_is_eupmus():
    """Steered by the package's controller a run is the one of eupmu with a budget."""
    rng = np.random.default_rng(0)
    apply = lambda params, x: x.reshape(len(x), -1) @ params
    x = jnp.asarray(rng.normal(size=(12, 8, 5)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, (12, 8)))
    batches = Batch(Examples(x, y), (y + 1) % 3, Examples(x[::-1], y[::-1]), jnp.zeros(12), jnp.zeros(12))
    ends = []
    for make in (
        controllers.CONTROLLERS[controllers.EUPMU],
        partial(controllers.steered, controllers.packaged()),
    ):
        method = make(apply, momentum(0.1), budget=0.1, baseline=1.0)
        params = jnp.zeros((5, 3))
        state = method.init(params, batches)
        seen = []
        for i in range(12):
            batch = jax.tree.map(lambda leaf, i=i: leaf[i], batches)
            params, state, record = method.step(params, state, batch)
            seen.append(float(record["multiplier"]))
        ends.append((params, seen))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)


@pytest.mark.parametrize("each_class", [False, True])
def test_held_out_feedback_has_the_value_of_one_and_the_gradient_of_the_other(each_class):
    rng = np.random.default_rng(0)
    apply = lambda params, x: x @ params
    images = [
        utilities.Images(
            jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32), jnp.arange(3)[:, None] + jnp.zeros(4, int)
        )
        for _ in range(2)
    ]
    batch = utilities.Batch(jnp.ones((4, 5)), jnp.zeros(4, int), *images)
    swapped = batch._replace(retain=batch.held_out)
    params = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    plain = utilities.make_losses(apply, each_class, held_out=False)
    steered = utilities.make_losses(apply, each_class, held_out=True)
    np.testing.assert_allclose(steered(params, batch).retain, plain(params, swapped).retain, rtol=1e-6)
    slope = lambda losses: jax.grad(lambda params: losses(params, batch).retain.sum())(params)
    np.testing.assert_allclose(slope(steered), slope(plain), rtol=1e-6)


def test_independent_batches_come_from_the_retain_set():
    sizes = {"steps": 50, "batch_size": 8, "seed": 0, "independent": True}
    plan = make_plan(np.arange(20), np.arange(20, 60), **sizes)
    assert set(plan.rows[:, 1].ravel()) <= set(range(20, 60))
    assert set(plan.rows[:, 0].ravel()) == set(range(20))
    assert len(np.unique(plan.rows[:5, 1])) < 40


def test_best_constant_is_read_off_the_front():
    front = pd.DataFrame({"rise": [0.0, 0.1, 0.15, 0.2], "forget_loss": [5.0, 3.0, 4.0, 1.0]})
    assert report.best_constant(front, 0.1) == 3.0
    assert report.best_constant(front, 0.15) == pytest.approx(2.0)
    assert np.isnan(report.best_constant(front, 0.3))


def test_summary_counts_feasible_runs_only():
    runs = pd.DataFrame({"feasible": [True, True, True, False], "spent": [0.9, 1.0, 1.2, 50.0]})
    found = report.summary(runs)
    assert found["feasible runs"] == "3"
    assert found["within 105%"] == "66.7%"
    assert found["median spent"] == "1.000"


def test_the_grid_is_as_large_as_promised():
    cells = study.grid_cells(study.FULL)
    assert len(set(cells)) == len(cells) > 400
    cells = study.efficiency_cells(study.FULL)
    assert len(cells) == 24
    assert len({cell._replace(seed=0) for cell in cells}) == 12
    assert len(study.FULL.weights) == 20
    runs = study.all_runs(study.FULL)
    assert len(set(runs)) == len(runs)
    restarts = study.SCHEDULES["warm restarts"](jnp.array([0.0, 0.125, 0.25]))
    np.testing.assert_allclose(restarts, [1, 0.5, 1], atol=1e-6)


def test_convergence_curves_fall():
    frame = convergence.run(steps=200, seeds=1, problems=("quadratic",))
    ours = frame[(frame["method"] == "this package") & (frame["noise"] == "deterministic")]
    for _, curve in ours.groupby("decay"):
        assert curve["residual"].iloc[-1] < 0.05 * curve["residual"].iloc[0]
    assert np.isfinite(frame["residual"]).all()
