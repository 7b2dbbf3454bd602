"""The whole run: the steps it takes, what it keeps, and that nothing is lost when it breaks."""

import contextlib
import gc
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu
from eupmu_jax.run import batches, ledger, loop

RNG = np.random.default_rng(0)
FORGET = {"x": RNG.normal(size=(40, 3)).astype(np.float32), "y": RNG.integers(0, 2, 40)}
RETAIN = {"x": RNG.normal(size=(100, 3)).astype(np.float32), "y": RNG.integers(0, 2, 100)}
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "b": jnp.zeros(2)}
INNER = optax.sgd(0.05, momentum=0.9)


def cross_entropy(params, rows):
    logits = rows["x"] @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows["y"]).mean()


def losses_fn(params, batch):
    wrong = batch["forget"] | {"y": 1 - batch["forget"]["y"]}
    return eu.Losses(cross_entropy(params, wrong), cross_entropy(params, batch["retain"]))


def assert_close(one, other):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


LOOKAHEAD = eu.Tolerance(0.0, measure="lookahead")


def run(
    params=PARAMS, forget=FORGET, retain=RETAIN, inner=INNER, constraint=LOOKAHEAD, fn=losses_fn, **settings
):
    settings = {"steps": 30, "batch_size": 8} | settings
    return eu.unlearn(fn, params, forget, retain, inner, constraint, **settings)


def assert_same(one, other):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


# What a run does.


def test_it_takes_the_steps_of_eupmu():
    """The same parameters as from a loop of one's own over the same batches."""
    tx = eu.eupmu(losses_fn, INNER, eu.Tolerance(0.0))
    step, params, state = eu.training_step(tx, PARAMS)
    forget, retain = (
        batches.forget_source(FORGET, 8, 0),
        batches.several_source(batches.retain_sets(RETAIN, 8), 0),
    )
    for t in range(30):
        batch = {"forget": forget(t), "retain": retain(t)}
        params, state, info = step(params, state, batch)
    got, history = run(constraint=eu.Tolerance(0.0))
    for a, b in zip(*map(jax.tree.leaves, (params, got)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(history.steps["multiplier"][-1], info.multiplier, rtol=1e-5)
    assert history.stopped is None
    assert history.best_step == 30
    assert_same(PARAMS, PARAMS)


def test_batches_are_passes_over_the_forget_set_and_draws_from_the_retain_set():
    rows = np.concatenate([batches.shuffled_rows(0, 40, 7, step) for step in range(40)])
    for start in range(0, 280, 40):
        np.testing.assert_array_equal(np.sort(rows[start : start + 40]), np.arange(40))
    assert not np.array_equal(rows[:40], rows[40:80])
    drawn = [batches.drawn_rows(0, 100, 16, step) for step in range(500)]
    assert all(len(set(one)) == 16 for one in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=100)
    # Mean 80, variance of 500 draws without repetition 500 * .16 * .84.
    assert np.all(np.abs(counts - 80) < 5 * 67**0.5)
    assert not np.array_equal(drawn[0], batches.drawn_rows(1, 100, 16, 0))


def test_epochs_count_passes_over_the_forget_set():
    assert len(run(steps=None, epochs=2)[1].steps["multiplier"]) == 10


def test_a_key_for_each_step():
    seen = eu.unlearn(
        lambda x, batch: eu.Losses(x * 0 + jax.random.uniform(batch["key"]), x),
        jnp.array(1.0), np.zeros(4), np.zeros(4), optax.sgd(0.1), eu.Tolerance(0.0), steps=20, batch_size=2,
    )[1].steps["forget_loss"]  # fmt: skip
    assert len(set(seen.tolist())) == 20


def test_the_baseline_of_a_budget_is_the_whole_retain_set():
    _, history = run(constraint=eu.Budget(0.1), steps=2)
    whole = cross_entropy(PARAMS, RETAIN)
    np.testing.assert_allclose(history.promise.baseline, whole, rtol=1e-6)
    # What the controller counts from: its average is R_0 before the second batch.
    seen = history.steps["violation"][1] + 0.1
    np.testing.assert_allclose(0.2 * (history.steps["retain_loss"][1] - whole), seen, atol=1e-5)


def test_frozen_leaves_reach_losses_fn_and_stay():
    params = PARAMS | {"shift": jnp.array([1, -1])}

    def fn(params, batch):
        shifted = params | {"b": params["b"] + params["shift"]}
        return losses_fn(shifted, batch)

    got, _ = run(params, fn=fn)
    assert got["shift"].dtype == jnp.int32
    np.testing.assert_array_equal(got["shift"], [1, -1])
    assert not np.allclose(got["w"], PARAMS["w"])


def test_linen_and_nnx():
    model = linen.Dense(2)
    variables = model.init(jax.random.key(0), FORGET["x"])
    graph, weights, rest = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param, ...)
    apply_nnx = lambda weights, x: nnx.merge(graph, weights, rest)(x)
    for params, apply in ((variables, model.apply), (weights, apply_nnx)):

        def fn(params, batch, apply=apply):
            loss = lambda rows, labels: optax.softmax_cross_entropy_with_integer_labels(
                apply(params, rows["x"]), labels
            ).mean()
            forget, retain = batch["forget"], batch["retain"]
            return eu.Losses(loss(forget, 1 - forget["y"]), loss(retain, retain["y"]))

        got, history = run(params, fn=fn)
        assert jax.tree.structure(got) == jax.tree.structure(params)
        assert history.steps["forget_loss"][-5:].mean() < history.steps["forget_loss"][:5].mean()


def test_several_utilities():
    def fn(params, batch):
        losses = losses_fn(params, batch)
        return losses._replace(retain=jnp.stack([losses.retain, 2 * losses.retain]))

    _, history = run(fn=fn, initial_multiplier=jnp.ones(2), constraint=eu.Budget([0.1, 0.2]))
    assert history.steps["multiplier"].shape == (30, 2)


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def test_a_mesh_gives_the_same_answer(x64):
    double = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    one = run(double(PARAMS))[0]
    sharded = jax.device_put(double(PARAMS), NamedSharding(mesh_of(2, 4), P()))
    sharded["w"] = jax.device_put(
        PARAMS["w"].astype(jnp.float64), NamedSharding(mesh_of(2, 4), P(None, "data"))
    )
    for params, mesh in ((double(PARAMS), mesh_of(8)), (sharded, mesh_of(2, 4))):
        got = run(params, mesh=mesh)[0]
        for a, b in zip(*map(jax.tree.leaves, (one, got)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)
    assert got["w"].sharding.spec == P(None, "data")


# Evaluation.


def test_evaluation_score_stop_and_callbacks():
    called = []
    evaluate = lambda params: {"accuracy": float(params["w"][0, 0])}
    got, history = run(
        evaluate=evaluate,
        every=5,
        score=lambda metrics: -abs(metrics["step"] - 15),
        stop=lambda metrics: "enough" if metrics["step"] >= 25 else None,
        callbacks=[lambda params, metrics: called.append((float(params["w"][0, 0]), metrics["accuracy"]))],
    )
    assert [metrics["step"] for metrics in history.evaluations] == [0, 5, 10, 15, 20, 25]
    assert history.best_step == 15
    assert history.stopped == "enough"
    assert len(history.steps["multiplier"]) == 25
    assert float(got["w"][0, 0]) == history.evaluations[3]["accuracy"]
    assert called == [(metrics["accuracy"], metrics["accuracy"]) for metrics in history.evaluations]
    np.testing.assert_allclose(
        history.evaluations[2]["retain_loss"], history.steps["retain_loss"][5:10].mean(), rtol=1e-6
    )


def test_rules():
    assert eu.reached("a", at_least=0.5)({"a": 0.4}) is None
    assert "0.6" in eu.reached("a", at_least=0.5)({"a": 0.6})
    assert eu.reached("a", at_most=1.0)({"a": [0.5, 1.5]}) is None
    assert eu.reached("a", at_most=1.0)({"a": [0.5, 1.0]}) == "a reached 0.5, 1"
    with pytest.raises(ValueError, match="needs at_most or at_least"):
        eu.reached("a")
    rule = eu.exhausted(np.array([1.0, 2.0]), np.array([0.1, 0.1]))
    assert rule({"retain_loss": [1.05, 2.05]}) is None
    assert "rose by 0.2" in rule({"retain_loss": [1.05, 2.2]})
    assert eu.over_forgetting("f", "u", slack=0.2)({"f": 0.7, "u": 0.8}) is None


# Faults.


def poisoned(steps):
    """Forget batches that hold a NaN at these steps."""
    draw = batches.forget_source(FORGET, 8, 0)

    def batch(step):
        rows = draw(step)
        return rows | {"x": rows["x"] * np.float32(np.nan if step in steps else 1)}

    return batch


def test_bad_steps_are_skipped_and_counted():
    bad = set(np.random.default_rng(1).choice(30, 7, replace=False).tolist())
    got, history = run(forget=poisoned(bad))
    counted = np.diff(history.steps["skipped_steps"], prepend=0)
    np.testing.assert_array_equal(np.flatnonzero(counted), sorted(bad))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    with pytest.warns(UserWarning, match="stopped after .* the last 50 steps were skipped"):
        got, history = run(forget=poisoned(range(10, 1000)), steps=300, every=20, folder=tmp_path)
    assert history.stopped.startswith("the last 50 steps")
    assert len(history.steps["multiplier"]) == 60
    assert_same(got, run(steps=10)[0])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"forget": {"x": np.zeros((0, 3)), "y": np.zeros(0)}}, ValueError, "forget is empty"),
        ({"retain": np.zeros((0, 3))}, ValueError, "retain is empty"),
        ({"batch_size": 41}, ValueError, "batch_size 41 is larger than the forget set, which has 40"),
        ({"batch_size": (8, 101)}, ValueError, "larger than the retain set"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"steps": None}, ValueError, "give steps or epochs"),
        ({"epochs": 2}, ValueError, "give steps or epochs"),
        ({"steps": 0}, ValueError, "steps must be a whole number >= 1"),
        ({"every": 0}, ValueError, "every"),
        ({"forget": {"x": np.zeros((40, 3)), "y": np.zeros(39)}}, ValueError, "forget must be arrays"),
        ({"forget": np.float32(3)}, ValueError, "forget must be arrays"),
        ({"params": {}}, TypeError, "no leaves"),
        ({"params": {"w": jnp.ones(3, jnp.int32)}}, TypeError, "no floating-point leaf"),
        ({"inner": 0.1}, TypeError, "inner"),
        ({"fn": None}, TypeError, "losses_fn"),
        ({"constraint": 0.1}, TypeError, "constraint must be"),
        ({"constraint": eu.Budget([0.1, 0.2])}, ValueError, "budget total must"),
        ({"trainable": "w"}, TypeError, "trainable must be a function"),
        ({"trainable": lambda path: False}, ValueError, "trainable accepts no floating-point leaf .* b, w"),
        ({"retain": lambda step: {k: v[: 8 + step] for k, v in RETAIN.items()}}, ValueError, "of step 1 is"),
    ],
)
def test_bad_input(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(**settings, folder=tmp_path)


# Folders and checkpoints.


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, capsys):
    def interrupt(params, metrics):
        if metrics["step"] == 12:
            raise KeyboardInterrupt

    settings = {
        "every": 4,
        "evaluate": lambda params: {"a": float(params["b"][0])},
        "score": lambda m: m["a"],
    }
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path, callbacks=[interrupt], **settings)
    resumed, whole = run(folder=tmp_path, **settings), run(**settings)
    assert f"the run in {tmp_path} goes on after step 12 of 30" in capsys.readouterr().err
    assert_same(resumed[0], whole[0])
    assert_same(resumed[1].steps, whole[1].steps)
    assert resumed[1].evaluations == whole[1].evaluations
    assert resumed[1].best_step == whole[1].best_step
    again = run(folder=tmp_path, **settings)
    assert f"the run in {tmp_path} has done all 30 steps" in capsys.readouterr().err
    assert_same(again[0], whole[0])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" not in line] == list(range(1, 31))


def test_the_exported_parameters(tmp_path):
    from safetensors.numpy import load_file

    got, _ = run(folder=tmp_path)
    saved = load_file(tmp_path / "params.safetensors")
    np.testing.assert_array_equal(saved["w"], got["w"])


def test_a_batch_that_the_mesh_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 8, the devices .* got 12"):
        run(mesh=mesh_of(8), batch_size=(16, 12))


def test_restored_on_another_mesh(tmp_path):
    def interrupt(params, metrics):
        if metrics["step"] == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path, every=4, mesh=mesh_of(8), callbacks=[interrupt])
    sharded = PARAMS | {"w": jax.device_put(PARAMS["w"], NamedSharding(mesh_of(2, 4), P(None, "data")))}
    got, _ = run(sharded, folder=tmp_path, every=4, mesh=mesh_of(2, 4))
    assert got["w"].sharding.spec == P(None, "data")
    for a, b in zip(*map(jax.tree.leaves, (run(every=4)[0], got)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4)


def test_other_settings_are_refused(tmp_path):
    run(folder=tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for change in (
        {"seed": 1},
        {"steps": 31},
        {"constraint": eu.Tolerance(0.1, measure="lookahead")},
        {"inner": optax.adam(0.1)},
        {"retain": RETAIN | {"x": RETAIN["x"] + np.arange(100)[:, None] // 99}},
        {"params": PARAMS | {"b": PARAMS["b"] + 1}},
        {"params": PARAMS | {"extra": jnp.ones(1)}},
    ):
        with pytest.raises(ValueError, match="holds a run with other settings"):
            run(folder=tmp_path, **change)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not empty and not that of a run"):
        run(folder=tmp_path / "foreign")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not the description of a run"):
        run(folder=tmp_path)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    whole = run(folder=tmp_path, every=10)[0]
    last = tmp_path / "checkpoints" / "30"
    for file in last.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * (file.stat().st_size // 2))
    with pytest.raises(ValueError, match=r"checkpoints/30 cannot be read(.|\n)*Delete that folder"):
        run(folder=tmp_path, every=10)
    subprocess.run(["rm", "-r", last], check=True)
    assert_same(run(folder=tmp_path, every=10)[0], whole)


def test_lost_metrics_are_noticed(tmp_path):
    run(folder=tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="does not hold all 30 steps"):
        run(folder=tmp_path)


# Orbax's writing threads die of what they also hand to the caller, with coroutines left behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk(tmp_path):
    """A file system of 256 KiB, which the checkpoints of larger parameters fill."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        assert os.geteuid() != 0, mounted.stderr
        pytest.skip("only root may mount a tmpfs")
    try:
        params = PARAMS | {"large": jnp.asarray(RNG.normal(size=2**16), jnp.float32)}
        with pytest.raises(OSError, match=r"could not be written .*(.|\n)*last whole checkpoint"):
            run(params, folder=small / "run")
        gc.collect()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_what_a_failing_run_keeps_is_all_that_was_done(tmp_path):
    """Data that fails within a chunk, a score that raises: the next start goes on from there."""
    draw = batches.forget_source(FORGET, 8, 0)

    def failing(step):
        if step == 17:
            raise OSError("disk unplugged")
        return draw(step)

    with pytest.raises(RuntimeError, match="step 17"):
        run(forget=failing, every=30, folder=tmp_path / "data")
    assert [path.name for path in (tmp_path / "data" / "checkpoints").iterdir()] == ["17"]
    assert_close(run(forget=draw, every=30, folder=tmp_path / "data")[0], run(every=30)[0])

    score = lambda metrics: metrics["accuracy"]
    with pytest.raises(ValueError, match="score asks for 'accuracy', but the metrics are step, "):
        run(score=score, every=10, folder=tmp_path / "score")
    assert [path.name for path in (tmp_path / "score" / "checkpoints").iterdir()] == ["10"]
    accuracy = lambda params: {"accuracy": float(params["b"][0])}
    with pytest.raises(ValueError, match="score asks for 'precision'"):
        run(
            score=lambda metrics: metrics["precision"], evaluate=accuracy, every=10, folder=tmp_path / "score"
        )
    resumed = run(score=score, evaluate=accuracy, every=10, folder=tmp_path / "score")
    whole = run(score=score, evaluate=accuracy, every=10)
    assert_same(resumed[0], whole[0])
    assert resumed[1].evaluations[1:] == whole[1].evaluations[1:]


@pytest.mark.parametrize(
    ("owner", "where"), [(ledger.Ledger, "give"), (ledger.Ledger, "_line"), (loop, "_looks_broken")]
)
def test_interrupted_where_parameters_and_metrics_differ(tmp_path, monkeypatch, owner, where):
    """Ctrl-C while a chunk is waited for must not save its end under the number of its start."""
    calls, original = [], getattr(owner, where)

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder=tmp_path, every=5)
    assert_same(run(folder=tmp_path, every=5)[0], run(every=5)[0])


@pytest.mark.parametrize("at", [3, 10, 17])
def test_an_interrupt_keeps_the_steps_that_were_done(tmp_path, at):
    """Between two steps nothing is lost; within the call of a step, the chunk is."""
    draw = batches.forget_source(FORGET, 8, 0)

    def interrupted(step):
        if step == at:
            raise KeyboardInterrupt
        return draw(step)

    with pytest.raises(KeyboardInterrupt):
        run(forget=interrupted, every=10, folder=tmp_path)
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == at
    resumed, whole = run(forget=draw, every=10, folder=tmp_path), run(every=10)
    assert_same(resumed[0], whole[0])
    assert resumed[1].evaluations == whole[1].evaluations


def test_an_interrupt_that_python_drops_still_ends_the_run(tmp_path):
    """As in JAX's hook of the garbage collector, where an exception is printed and ignored."""
    draw, sent = batches.forget_source(FORGET, 8, 0), []

    def dropped(step):
        if step == 12 and not sent:
            sent.append(step)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return draw(step)

    # Workers of the test runner have a handler of their own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(forget=dropped, every=10, folder=tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same(run(forget=draw, every=10, folder=tmp_path)[0], run(every=10)[0])


def test_a_rule_to_stop_comes_before_data_that_ends():
    draw = batches.forget_source(FORGET, 8, 0)

    def ending(step):
        if step >= 10:
            raise IndexError("no more")
        return draw(step)

    settings = {"every": 10, "stop": lambda metrics: "enough" if metrics["step"] >= 10 else None}
    assert run(forget=ending, **settings)[1].stopped == "enough"


def test_the_baseline_of_a_resumed_run_is_the_one_it_started_with(tmp_path):
    """Another processor may get another last bit."""
    run(constraint=eu.Budget(0.1), folder=tmp_path, steps=4)
    described = json.loads((tmp_path / "run.json").read_text())
    described["constraint"]["baseline"] *= 1 + 1e-7
    (tmp_path / "run.json").write_text(json.dumps(described))
    run(constraint=eu.Budget(0.1), folder=tmp_path, steps=4)


def test_a_baseline_for_each_utility():
    def fn(params, batch):
        losses = losses_fn(params, batch)
        return losses._replace(retain=jnp.stack([losses.retain, 2 * losses.retain, losses.retain]))

    history = run(fn=fn, constraint=eu.Budget(0.1), steps=3)[1]
    assert history.steps["multiplier"].shape == (3, 3)


def test_a_folder_in_use_is_refused(tmp_path):
    def again(params, metrics):
        with pytest.raises(ValueError, match="is in use by another run"):
            run(folder=tmp_path, steps=4)

    run(folder=tmp_path, steps=4, callbacks=[again])
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "run.json.partial").write_text("{")
    run(folder=tmp_path / "killed", steps=4)


def test_names_that_cannot_be_saved_are_refused_at_once(tmp_path):
    params = {"a": {"b": jnp.ones(3)}, "a.b": jnp.ones(3)}
    with pytest.raises(ValueError, match="two arrays have the same path"):
        run(params, folder=tmp_path)


def test_numpy_numbers(tmp_path):
    one = np.int64(1)
    run(batch_size=8 * one, seed=one, steps=4 * one, every=one, folder=tmp_path)


KILLED = """
import sys, time
import numpy as np
from test_unlearning import run
def slowly(params):
    time.sleep(0.02)
    return {"a": float(params["b"][0])}
params, history = run(folder=sys.argv[1], steps=600, every=3, evaluate=slowly, score=lambda m: -m["step"] % 7)
np.savez(sys.argv[2], **params, **history.steps, best=history.best_step)
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """Four SIGKILLs, at random moments and while a checkpoint is written, change no bit of the end."""
    environment = os.environ | {
        "PYTHONPATH": f"{pathlib.Path(__file__).parent}:{pathlib.Path(__file__).parents[2]}"
    }
    start = lambda name: subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / name), str(tmp_path / f"{name}.npz")], env=environment
    )
    saved = lambda: {path.name for path in (tmp_path / "killed" / "checkpoints").glob("*")}
    moments = random.Random(0)
    kills = 0
    while kills < 4:
        process, before = start("killed"), saved()
        while process.poll() is None and saved() == before:
            time.sleep(0.001)
        # A new name there is a checkpoint that is being written: half of the kills come right then.
        time.sleep(0 if kills % 2 else moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "killed before it was done"
        kills += 1
    assert start("killed").wait() == 0
    assert start("whole").wait() == 0
    killed, whole = (np.load(tmp_path / f"{name}.npz") for name in ("killed", "whole"))
    assert set(killed) == set(whole)
    for name in whole:
        np.testing.assert_array_equal(killed[name], whole[name], err_msg=name)
