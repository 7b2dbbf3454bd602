"""The promise: what comes back is within its budget, measured on the whole retain set, or is what came in."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import eupmu_jax as eu
from eupmu_jax.cli import report
from eupmu_jax.run.promise import rise_on_unseen, within

RNG = np.random.default_rng(0)
FORGET = RNG.normal(1.0, 0.3, (40, 3)).astype(np.float32)
RETAIN = RNG.normal(0.0, 0.3, (130, 3)).astype(np.float32)
PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros(())}


def losses_fn(params, batch):
    loss = lambda rows: jnp.mean((rows - params["w"] - params["b"]) ** 2)
    return eu.Losses(loss(batch["forget"]), loss(batch["retain"]))


def two_losses(params, batch):
    forget, retain = losses_fn(params, batch)
    return eu.Losses(forget, jnp.stack([retain, 3 * jnp.mean((batch["retain"] - params["b"]) ** 2)]))


def whole_rise(params, fn=losses_fn, rows=RETAIN):
    batch = {"forget": FORGET, "retain": rows}
    return np.asarray(fn(params, batch).retain - fn(PARAMS, batch).retain)


def run(fn=losses_fn, retain=RETAIN, constraint=None, inner=None, **settings):
    inner = inner or optax.sgd(0.05)
    settings = {"steps": 40, "batch_size": 16} | settings
    return eu.unlearn(fn, PARAMS, FORGET, retain, inner, constraint or eu.Budget(0.1), **settings)


@pytest.mark.parametrize(
    "inner", [optax.sgd(0.05), optax.sgd(0.5), optax.adam(0.1)], ids=["low", "high", "adam"]
)
def test_what_comes_back_is_within_its_budget(inner):
    params, history = run(inner=inner)
    promise = history.promise
    assert promise.holds
    assert whole_rise(params) <= 0.1
    np.testing.assert_allclose(promise.rise, whole_rise(params), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(promise.share, promise.rise / 0.1)
    assert promise.examples == 130
    assert promise.budget == 0.1


@pytest.mark.parametrize("fn", [losses_fn, two_losses])
def test_steps_that_went_too_far_are_taken_back(fn):
    """A baseline that is too high lets the controller spend far more than there is."""
    before = np.asarray(fn(PARAMS, {"forget": FORGET, "retain": RETAIN}).retain)
    params = {"w": jnp.full(3, 0.8), "b": jnp.zeros(())}
    budget = eu.Budget(np.full(before.shape, 0.1), baseline=before)
    of = measured_on(fn)
    got, promise = within(params, of, budget, lambda: PARAMS)
    assert promise.repair_steps >= 1
    assert promise.holds
    assert np.all(whole_rise(got, fn) <= 0.1)
    assert np.max(promise.share) > 0.8, "it takes back what is over, and no more"


def measured_on(fn, frozen=None):
    from eupmu_jax.run.batches import retain_sets
    from eupmu_jax.run.promise import retained

    frozen = {"w": None, "b": None} if frozen is None else frozen
    return retained(fn, frozen, FORGET[:16], retain_sets(RETAIN, 16), seed=0)


def test_a_step_that_made_it_worse_is_taken_back():
    """R turns sharply upwards beyond 0: whole Polyak steps jump over the valley for ever."""
    valley = lambda b: jnp.maximum(b, 0) + 4 * jnp.maximum(-b, 0)
    fn = lambda params, batch: eu.Losses(
        0.0, jnp.mean(batch["retain"]) * 0 + valley(params["b"] - 0.01) + 0.095
    )
    params = {"w": jnp.zeros(3), "b": jnp.array(0.5)}
    steep = {"w": jnp.zeros(3), "b": jnp.array(-0.5)}
    for start in (params, steep):
        got, promise = within(start, measured_on(fn), eu.Budget(0.1, baseline=0.0), lambda: PARAMS)
        assert promise.holds, start
        assert abs(float(got["b"]) - 0.01) <= 0.005
    nothing_left = eu.Budget(0.09, baseline=0.0)
    _, promise = within(params, measured_on(fn), nothing_left, lambda: params)
    assert not promise.holds
    assert promise.repair_steps == 10


def test_one_step_is_enough_where_the_loss_is_a_line():
    fn = lambda params, batch: eu.Losses(jnp.sum(params["w"]), jnp.mean(batch["retain"]) * 0 + params["b"])
    params = {"w": jnp.zeros(3), "b": jnp.array(0.5)}
    got, promise = within(params, measured_on(fn), eu.Budget(0.1, baseline=0.0), lambda: PARAMS)
    assert promise.repair_steps == 1
    np.testing.assert_allclose(got["b"], 0.097, rtol=1e-5)


def unrepairable(params, batch):
    """A retain loss that rises with every step and has no gradient."""
    risen = jax.lax.stop_gradient(jnp.sum(params["w"]))
    return eu.Losses(losses_fn(params, batch).forget, jnp.mean(batch["retain"] ** 2) + risen)


def test_what_repairs_do_not_bring_back_goes_part_of_the_way():
    """On the line between, the retain loss is what it is: the furthest of 64 places within the budget."""
    with pytest.warns(UserWarning, match="% of the way"):
        params, history = run(unrepairable)
    promise = history.promise
    assert promise.holds
    assert promise.repair_steps == 10
    assert 0 < promise.way < 1
    assert float(64 * promise.way).is_integer()
    for a, b in zip(*map(jax.tree.leaves, (params, PARAMS)), strict=True):
        assert np.any(a != b)
    batch = {"forget": FORGET, "retain": RETAIN}
    rise = unrepairable(params, batch).retain - unrepairable(PARAMS, batch).retain
    np.testing.assert_allclose(promise.rise, rise, rtol=1e-4)
    assert 0.5 < promise.share <= 1
    assert unrepairable(params, batch).forget < unrepairable(PARAMS, batch).forget


@pytest.mark.parametrize("score", [None, lambda metrics: metrics["step"]], ids=["last", "best"])
def test_where_it_cannot_be_kept_what_came_in_comes_back(score):
    """Below what the parameters had at the start, no place on the way is within the budget."""
    too_low = eu.Budget(0.1, baseline=float(np.mean(RETAIN**2)) - 1)
    with pytest.warns(UserWarning, match="could not be kept .* nothing is forgotten"):
        params, history = run(unrepairable, score=score, constraint=too_low)
    for a, b in zip(*map(jax.tree.leaves, (params, PARAMS)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not history.promise.holds
    np.testing.assert_allclose(history.promise.rise, 1.0, rtol=1e-6)
    assert history.promise.way == 0
    assert history.best_step == 0
    assert history.promise.repair_steps == 10
    assert "nothing is forgotten" in eu.verdict(history.promise)


def test_a_model_that_is_broken_is_not_repaired_but_returned_as_it_was():
    blown_up = optax.sgd(1e30)
    with pytest.warns(UserWarning, match="could not be kept"):
        params, history = run(inner=blown_up, steps=3)
    assert np.all(np.isfinite(params["w"]))
    assert history.promise.repair_steps == 0


def test_the_best_and_an_early_end_are_measured():
    params, history = run(score=lambda metrics: -metrics["step"], every=10)
    assert history.best_step == 10
    np.testing.assert_allclose(history.promise.rise, whole_rise(params), rtol=1e-4, atol=1e-6)
    params, history = run(stop=lambda metrics: "enough", every=10)
    assert history.stopped == "enough"
    np.testing.assert_allclose(history.promise.rise, whole_rise(params), rtol=1e-4, atol=1e-6)


def test_a_budget_for_each_utility():
    params, history = run(two_losses, constraint=eu.Budget([0.1, 0.02]))
    assert history.promise.holds
    assert np.all(whole_rise(params, two_losses) <= [0.1, 0.02])
    promise = history.promise
    worst = 1 + int(np.argmax(promise.share))
    nearest = f"All 2 retain losses kept their budgets; number {worst}, the nearest to its budget, rose by"
    assert nearest in eu.verdict(promise)
    named = "; chat, the nearest to its budget, rose by"
    assert named in eu.verdict(promise, ["chat" if i == worst - 1 else "code" for i in range(2)])
    with pytest.raises(ValueError, match="names: 1 for 2 utilities"):
        eu.verdict(promise, ["chat"])
    # One utility of shape [1] is spoken of as a scalar is.
    alone = promise._replace(
        **{name: getattr(promise, name)[:1] for name in ("baseline", "budget", "rise", "share")}
    )
    assert eu.verdict(alone).startswith("The retain loss rose by")


def test_several_sets_are_measured_each_on_its_own_rows():
    def fn(params, batch):
        loss = lambda rows: jnp.mean((rows - params["w"] - params["b"]) ** 2)
        return eu.Losses(loss(batch["forget"]), jnp.stack([loss(rows) for rows in batch["retain"]]))

    sets = [RETAIN[:90], RETAIN[90:]]
    params, history = run(fn, sets)
    assert history.promise.examples == 130
    np.testing.assert_allclose(
        history.promise.rise, [whole_rise(params, rows=rows) for rows in sets], rtol=1e-3
    )


def test_functions_are_measured_only_on_what_is_given():
    draw = lambda step: RETAIN[np.random.default_rng(step).choice(130, 16)]
    assert run(retain=draw)[1].promise is None
    assert "Nothing was promised" in eu.verdict(None)
    params, history = run(retain=draw, measured_on=RETAIN)
    assert history.promise.examples == 130
    assert whole_rise(params) <= 0.1
    assert run(constraint=eu.Tolerance(0.01))[1].promise is None


@pytest.mark.usefixtures("x64")
def test_a_small_rise_of_a_large_loss_is_seen_in_float64():
    """1e-5 of 1e6, where float32 has steps of .06."""

    def large(params, batch):
        forget, retain = losses_fn(params, batch)
        return eu.Losses(forget, 1e6 + retain)

    wide = {name: leaf.astype(jnp.float64) for name, leaf in PARAMS.items()}
    params, history = eu.unlearn(
        large, wide, FORGET.astype(float), RETAIN.astype(float), optax.sgd(1e-3), eu.Budget(1e-2), steps=40,
        batch_size=16,
    )  # fmt: skip
    rise = np.mean((RETAIN.astype(float) - np.asarray(params["w"] + params["b"])) ** 2)
    rise -= np.mean(RETAIN.astype(float) ** 2)
    np.testing.assert_allclose(history.promise.rise, rise, rtol=1e-5)
    assert 0 < history.promise.rise <= 1e-2
    assert history.steps["multiplier"].dtype == np.float32


@pytest.mark.parametrize("name", ["held_out", "measured_on"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (RETAIN[:0], "NAME is empty"),
        (lambda step: RETAIN, "NAME must hold arrays.* no function"),
        (np.float32(3), "NAME must be arrays with one leading axis"),
        ({"x": RETAIN}, "NAME must hold rows like those of retain"),
        ([RETAIN, RETAIN[:7]], "NAME must hold rows like those of retain"),
    ],
)
def test_rows_that_nothing_can_be_measured_on_are_named_before_the_first_step(name, rows, message):
    looked = []
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        run(evaluate=lambda params: looked.append(1) or {}, **{name: rows})
    assert not looked
    with pytest.raises(ValueError, match=r"go with a Budget"):
        run(constraint=eu.Tolerance(0.01), **{name: RETAIN})


def test_few_rows_to_measure_on_are_enough():
    draw = lambda step: RETAIN[np.random.default_rng(step).choice(130, 16)]
    assert run(retain=draw, measured_on=RETAIN[:6], constraint=eu.Budget(0.5))[1].promise.examples == 6
    with pytest.raises(ValueError, match="held_out needs retain as arrays, or measured_on"):
        run(retain=draw, held_out=RETAIN)


def test_a_run_goes_on_with_the_rows_that_its_budget_was_measured_on(tmp_path):
    draw = lambda step: RETAIN[np.random.default_rng(step).choice(130, 16)]
    settings = {"retain": draw, "folder": tmp_path}
    run(measured_on=RETAIN, **settings)
    for other in (RETAIN + 1, None):
        with pytest.raises(ValueError, match=r"other settings .*measured_on"):
            run(measured_on=other, **settings)


def test_held_out_rows_are_told_apart_with_a_bound():
    unseen = RNG.normal(0.05, 0.3, (500, 3)).astype(np.float32)
    params, history = run(held_out=unseen)
    promise = history.promise
    np.testing.assert_allclose(promise.held_out_rise, whole_rise(params, rows=unseen), rtol=1e-3, atol=1e-5)
    assert promise.held_out_bound > promise.held_out_rise


def test_the_bound_covers_the_truth_in_nineteen_of_twenty_draws():
    covered = []
    for seed in range(400):
        changes = np.random.default_rng(seed).normal(0.3, 1.0, (16, 1))
        ones = np.ones((16, 1))
        covered.append(rise_on_unseen((0 * ones, ones), (changes, ones))[1][0] >= 0.3)
    assert abs(np.mean(covered) - 0.95) < 4 * (0.95 * 0.05 / 400) ** 0.5
    one = np.ones((1, 1))
    assert rise_on_unseen((0 * one, one), (one, one))[1] == np.inf


def test_on_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    one, other = run(inner=optax.sgd(0.5)), run(inner=optax.sgd(0.5), mesh=mesh)
    np.testing.assert_allclose(other[0]["w"], one[0]["w"], rtol=1e-4)
    assert other[1].promise.repair_steps == one[1].promise.repair_steps


def test_frozen_leaves_stay(tmp_path):
    params, history = run(inner=optax.sgd(0.5), trainable=lambda path: path == "w", folder=tmp_path)
    assert params["b"] is PARAMS["b"]
    assert whole_rise(params) <= 0.1
    assert history.promise.holds


def test_what_is_kept_of_a_promise(tmp_path):
    _, history = run(folder=tmp_path)
    kept = json.loads((tmp_path / "promise.json").read_text())
    assert kept["rise"] == pytest.approx(float(history.promise.rise))
    again = run(folder=tmp_path)[1]
    assert again.promise == history.promise


def test_what_json_has_no_number_for_is_null(tmp_path):
    """The bound from one row alone is infinite."""
    _, history = run(folder=tmp_path, held_out=RETAIN[:1])
    assert history.promise.held_out_bound == np.inf
    strict = lambda text: pytest.fail(f"{text} is not JSON")
    kept = json.loads((tmp_path / "promise.json").read_text(), parse_constant=strict)
    assert kept["held_out_bound"] is None
    assert report.write(tmp_path).exists()


def test_interrupted_during_the_repair_it_ends_the_same_to_the_bit(tmp_path, monkeypatch):
    from eupmu_jax.run import promise

    settings = {"inner": optax.sgd(0.3, momentum=0.9), "constraint": eu.Budget(0.01), "batch_size": 4}
    whole = run(**settings)
    assert whole[1].promise.repair_steps > 0

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(promise, "_polyak", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder=tmp_path, **settings)
    resumed = run(folder=tmp_path, **settings)
    np.testing.assert_array_equal(resumed[0]["w"], whole[0]["w"])
    assert resumed[1].promise == whole[1].promise


KILLED = """
import os, signal, sys
import numpy as np
import optax
import eupmu_jax as eu
from eupmu_jax.run import promise
from tests.run.test_promise import run
polyak = promise._polyak
def killed(*args):
    if len(sys.argv) > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return polyak(*args)
promise._polyak = killed
settings = {"inner": optax.sgd(0.3, momentum=0.9), "constraint": eu.Budget(0.01), "batch_size": 4}
params, history = run(folder=sys.argv[1], **settings)
np.savez(sys.argv[2], **params, steps=history.promise.repair_steps, rise=history.promise.rise)
"""


@pytest.mark.slow
def test_killed_during_the_repair_it_ends_the_same_to_the_bit(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}

    def start(name, *more):
        command = [sys.executable, "-c", KILLED, str(tmp_path / name), str(tmp_path / f"{name}.npz"), *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert start("killed", "kill").returncode == -signal.SIGKILL
    again, whole = start("killed"), start("whole")
    assert again.returncode == whole.returncode == 0, again.stderr + whole.stderr
    # Whether the last checkpoint was whole by then is a race; what comes out is not.
    assert f"the run in {tmp_path}" in again.stderr
    killed, whole = (np.load(tmp_path / f"{name}.npz") for name in ("killed", "whole"))
    assert whole["steps"] > 0
    for name in whole:
        np.testing.assert_array_equal(killed[name], whole[name], err_msg=name)


def test_what_it_costs():
    """The whole set once before, once after, once more for each repair; 1,024 rows for its gradient."""
    rows, of = [], measured_on(lambda params, batch: losses_fn(params, count(batch, rows)))
    budget = eu.Budget(0.1, baseline=float(np.mean(RETAIN**2)))
    params = {"w": jnp.asarray(np.full(3, 0.8, np.float32)), "b": jnp.asarray(np.float32(0))}
    assert within(params, of, budget, lambda: PARAMS)[1].repair_steps > 0
    # Each shape is traced once, forward and backward: all else are calls of compiled programs.
    assert sorted(rows) == [2, 16, 16]


def test_passes_and_gradient_rows(monkeypatch):
    """A measurement more than there are repairs; both gradients of a repair together are about one pass."""
    from eupmu_jax.run import promise

    drawn, real = [], promise.several_source

    def counted(retain, seed):
        draw = real(retain, seed)
        return lambda step: drawn.append(step) or draw(step)

    monkeypatch.setattr(promise, "several_source", counted)
    of, passes = measured_on(losses_fn), []
    counting = of._replace(parts=lambda trained: passes.append(1) or of.parts(trained))
    params = {"w": jnp.full(3, 0.8), "b": jnp.zeros(())}
    found = within(params, counting, eu.Budget(0.1, baseline=float(np.mean(RETAIN**2))), lambda: PARAMS)[1]
    assert found.repair_steps > 0
    assert len(passes) == found.repair_steps + 1
    # 130 rows in batches of 16 are 9, in two halves of 5; no batch serves two gradients.
    assert len(drawn) == len(set(drawn)) <= 10 * found.repair_steps


def count(batch, rows):
    rows.append(len(batch["retain"]))
    return batch


def test_sentences():
    numbers = lambda rise: (np.array(1.2), np.array(0.1), np.array(rise), np.array(rise / 0.1))
    part = eu.Promise(*numbers(0.09), examples=10, repair_steps=10, holds=True, way=0.25)
    assert "rose by 0.09 of the 0.1 you allowed (measured on 10 examples). The last steps" in eu.verdict(part)
    assert "25% of the way" in eu.verdict(part)
    fell = eu.Promise(*numbers(-0.02), examples=10, repair_steps=0, holds=True)
    said = "The retain loss fell by 0.02; you allowed a rise of 0.1 (measured on 10 examples)."
    assert eu.verdict(fell) == said
