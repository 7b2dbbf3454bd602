"""The budget study's own pieces: the controllers it compares, its losses, and how it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import eupmu_jax as eu
from eupmu_jax.method.controller import make_controller
from experiments.budget import controllers, convergence, report, study, utilities
from experiments.shared.labels import LabelledExamples, label_losses
from experiments.shared.loop import make_plan, momentum
from experiments.shared.methods.method import Batch, retain_loss


def follow(make_controller, observations):
    """The multipliers after a budget of 2 and a baseline of 1 were spent in these shares."""
    controller = make_controller(2.0, 1.0)
    state, seen = controller.init(), []
    for y in observations:
        state = controller.before(state, eu.Losses(jnp.float32(1), jnp.float32(1 + 2 * y)))
        seen.append(float(state.multiplier))
    return seen


def test_rules_by_hand():
    """A share of the budget of 2 twice: what each rule that has no noise filter of its own makes of it."""
    ascent = follow(controllers.dual_ascent(optax.sgd(0.1)), [2, 2])
    np.testing.assert_allclose(ascent, [1.1, 1.2], rtol=1e-6)
    integral = follow(controllers.proportional_integral, [2, 2])
    np.testing.assert_allclose(integral, [1 + 0.1 + 0.03, 1 + 0.19 + 0.06], rtol=1e-6)
    # The average of 2 with the start at 0 is 0.4, then 0.72.
    powers = follow(controllers.multiplicative, [2, 2])
    np.testing.assert_allclose(np.log(powers), [-0.06, -0.06 - 0.028], rtol=1e-5)
    fixed = follow(controllers.fixed_gains, [2])
    np.testing.assert_allclose(np.log(fixed), [3 * -0.6 + 0.1 * -0.6 + 10 * 0.4], rtol=1e-5)
    frozen = follow(controllers.secant, [1, 1, 1])
    assert all(multiplier < 1 for multiplier in frozen)
    assert follow(controllers.barrier, [5.0])[0] > 1


LINEAR = label_losses(lambda params, x: x.reshape(len(x), -1) @ params)


def batches_of(amount):
    """So many different batches of eight."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(amount, 8, 5)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, (amount, 8)))
    forget, retain = LabelledExamples(x, y, (y + 1) % 3), LabelledExamples(x[:, ::-1], y, y)
    return Batch(forget, retain, jnp.zeros(amount), jnp.zeros(amount))


def run_of(name, batches, **more):
    """Twelve steps under one of the controllers: the parameters and what was seen."""
    amount = len(batches.progress)
    method = controllers.CONTROLLERS[name].make(LINEAR, momentum(0.1), budget=0.1, baseline=1.0, **more)
    params, seen = jnp.zeros((5, 3)), []
    state = method.init(params, batches)
    for i in range(12):
        batch = jax.tree.map(lambda leaf, i=i % amount: leaf[i], batches)
        params, state, record = method.step(params, state, batch)
        record["retain_loss after"] = retain_loss(LINEAR, params, batch)
        seen.append({key: float(value) for key, value in record.items()})
    return params, pd.DataFrame(seen)


@pytest.mark.slow
def test_seeing_the_full_loss_is_eupmus_budget_where_a_batch_is_all_there_is():
    whole = batches_of(1)
    full = lambda params: retain_loss(LINEAR, params, jax.tree.map(lambda leaf: leaf[0], whole))
    params, seen = run_of(controllers.EUPMU, whole)
    shown, seen_shown = run_of("EUPMU budget, seeing the full loss", whole, full_retain_loss=full)
    np.testing.assert_allclose(params, shown, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["multiplier"], seen_shown["multiplier"], rtol=1e-5)
    assert np.ptp(seen["multiplier"]) > 0.1
    _, elsewhere = run_of("EUPMU budget, seeing the full loss", batches_of(12), full_retain_loss=full)
    assert not np.allclose(
        elsewhere["multiplier"], run_of(controllers.EUPMU, batches_of(12))[1]["multiplier"]
    )


def test_looking_ahead_steers_by_what_the_last_step_came_to():
    _, ends = run_of("EUPMU budget, looking ahead", batches_of(12))
    controller = make_controller(eu.Budget(0.1, baseline=1.0), 1.0)
    state, expected = controller.init(), []
    for forget, seen in zip(ends["forget_loss"], [1.0, *ends["retain_loss after"][:-1]], strict=True):
        state = controller.before(state, eu.Losses(jnp.float32(forget), jnp.float32(seen)))
        expected.append(float(state.multiplier))
    np.testing.assert_allclose(ends["multiplier"], expected, rtol=1e-4)
    assert np.ptp(expected) > 0.1


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
    assert set(plan.rows.retain.ravel()) <= set(range(20, 60))
    assert set(plan.rows.forget.ravel()) == set(range(20))
    assert len(np.unique(plan.rows.retain[:5])) < 40


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


@pytest.mark.slow
def test_convergence_curves_fall():
    frame = convergence.run(steps=200, seeds=1, problems=("quadratic",))
    ours = frame[(frame["method"] == "this package") & (frame["noise"] == "deterministic")]
    for _, curve in ours.groupby("decay"):
        assert curve["residual"].iloc[-1] < 0.05 * curve["residual"].iloc[0]
    assert np.isfinite(frame["residual"]).all()
