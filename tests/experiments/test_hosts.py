"""Every host forgets the digit within its budget, by its own training step."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys

import jax
import matplotlib as mpl
import numpy as np
import pytest

from experiments.hosts import optax_alone, task


def check(outcome, capsys):
    assert outcome.named < 0.05 * outcome.images
    assert 0 < outcome.rise <= task.TOTAL
    said = capsys.readouterr().out
    assert f"Forgotten: of the 183 images of the digit 3 it still names {outcome.named}." in said
    assert f"The budget is kept: the loss on the others rose by {outcome.rise:.3f} of 0.1 nats." in said


@pytest.mark.parametrize(
    "host", ["optax_alone", *(pytest.param(name, marks=pytest.mark.slow) for name in ("linen", "nnx"))]
)
def test_forgets_within_its_budget(host, capsys):
    check(importlib.import_module(f"experiments.hosts.{host}").main(), capsys)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is no dependency")
def test_keras_forgets_within_its_budget():
    """In a process of its own, since Keras reads its backend when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.hosts.keras_jax"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"KERAS_BACKEND": "jax"},
    )
    assert done.returncode == 0, done.stderr
    assert "it still names 0." in done.stdout
    assert "The budget is kept" in done.stdout


@pytest.mark.slow
def test_two_processes_forget_within_their_budget():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.hosts.processes"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, 4 devices." in done.stdout
    assert "it still names 0." in done.stdout
    assert done.stdout.count("The budget is kept") == 1
    assert "of the 0.1 you allowed (measured on 1,614 examples)." in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="Grain is no dependency")
def test_rows_from_files_are_those_of_the_sets_and_follow_from_the_step(tmp_path):
    """Interrupted and gone on with: to the bit what it is without."""
    from experiments.hosts import grain_data

    for name, rows in task.SETS.items():
        grain_data.write(tmp_path / f"{name}.array_record", rows)
    forget = grain_data.opened(tmp_path / "forget.array_record")
    whole = jax.tree.map(lambda *parts: np.stack(parts), *(forget[i] for i in range(len(forget))))
    jax.tree.map(np.testing.assert_array_equal, whole, task.SETS["forget"])
    of_one_pass = grain_data.passes(forget, 61, seed=0)
    seen = np.concatenate([of_one_pass(step)["x"] for step in range(3)])
    assert sorted(map(bytes, seen)) == sorted(map(bytes, whole["x"]))

    def interrupt(params, metrics):
        if metrics["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grain_data.unlearn(tmp_path, optax_alone.initial(), steps=8, callbacks=[interrupt])
    resumed = grain_data.unlearn(tmp_path, optax_alone.initial(), steps=8)
    shutil.rmtree(tmp_path / "run")
    jax.tree.map(
        np.testing.assert_array_equal, resumed, grain_data.unlearn(tmp_path, optax_alone.initial(), steps=8)
    )


def test_the_report_says_when_a_budget_is_not_kept(capsys):
    """Of a network that knows nothing."""
    predict = lambda x: np.zeros((len(x), 10), np.float32)
    outcome = task.report(predict, 0.5)
    assert outcome.named == 0
    np.testing.assert_allclose(outcome.rise, np.log(10) - 0.5, rtol=1e-5)
    assert "The budget is not kept" in capsys.readouterr().out


def test_batches_are_drawn_anew_and_follow_from_the_seed():
    first, second = (list(task.batches(3, size=8, seed=1)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert all(np.all(batch["forget"]["y"] == task.FORGET) for batch in first)
    assert not any(np.any(batch["retain"]["y"] == task.FORGET) for batch in first)
    assert not np.array_equal(first[0]["retain"]["x"], first[1]["retain"]["x"])
    assert optax_alone.predict(optax_alone.initial(), first[0]["retain"]["x"]).shape == (8, 10)


@pytest.mark.slow
def test_new_digits_are_learned_within_the_budget_of_the_old_ones(tmp_path, capsys):
    mpl.use("agg")
    from experiments.hosts import continual

    alone, budgeted = continual.main(str(tmp_path / "picture.png")).values()
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert alone.promise is None
    assert budgeted.promise.holds
    assert float(budgeted.promise.rise) <= continual.TOTAL
    last = budgeted.evaluations[-1]
    assert min(last["old"], last["new"]) > 0.85
    forgot = alone.evaluations[-1]
    assert forgot["old"] < 0.5
    assert forgot["new"] > 0.85
    assert "of the 0.1 you allowed (measured on 663 examples)" in capsys.readouterr().out
