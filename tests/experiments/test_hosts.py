"""Every host forgets the digit within its budget, by its own training step."""

import importlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import warnings

import chex
import jax
import matplotlib as mpl
import numpy as np
import optax
import pytest
from flax import nnx

import eupmu_jax as eu
from eupmu_jax import objectives
from eupmu_jax.flax import Weighted, saddle_point
from experiments.hosts import optax_alone, task
from experiments.language import tiny
from experiments.language.texts import CHAT, chat
from experiments.shared.models.llama import files
from experiments.shared.models.llama import model as llama


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
@pytest.mark.skipif(importlib.util.find_spec("gemma") is None, reason="Gemma takes Python 3.12")
def test_npo_alone_costs_what_its_budget_does_not_allow():
    done = subprocess.run(
        [sys.executable, "-c", "from experiments.hosts import gemma_kauldron as g; print(g.main())"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rises = [float(rise) for rise in re.findall(r"the loss on the others rose by (\S+) nats", done.stdout)]
    assert rises[0] > 1
    assert 0 < rises[1] <= 0.1
    assert all(int(named) < 40 for named in re.findall(r": now (\d+)", done.stdout))


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


@pytest.fixture(scope="module")
def tunix_peft():
    """Its imports warn of this and that."""
    if importlib.util.find_spec("tunix") is None:
        pytest.skip('Tunix brings 1.6 GB and is not installed: pip install -e ".[tunix]"')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("experiments.hosts.tunix_peft")


TINY_LENGTH = 128


@pytest.fixture(scope="module")
def learned_llama(tmp_path_factory):
    """A folder with a small Llama that has learned the answers, byte by byte."""
    folder = tiny.make(tmp_path_factory.mktemp("llama") / "random", seed=0)
    rows = chat(files.load_tokenizer(folder), CHAT, TINY_LENGTH)
    config, params = files.load(folder)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = llama.logits(config, params, rows.tokens[:, :-1])
            return objectives.cross_entropy(logits, rows.tokens[:, 1:], rows.mask[:, 1:]).mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(150):
        params, state = step(params, state)
    learned = folder.with_name("learned")
    files.save(learned, config, params, like=folder)
    return learned


def tunix_batches(host, folder, size):
    sets = host.load_sets(folder, TINY_LENGTH)
    return itertools.islice(host.batches(sets, size), 40)


def tunix_run(host, source, data, steps, **settings):
    """The adapters, the weights and what `surgery_info` says after so many steps of Tunix's trainer."""
    budget, multiplier = eu.Budget(np.full(2, 0.1), baseline=np.full(2, 3.0)), np.ones(2)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9))
    module = Weighted(host.load(source), budget, initial_multiplier=multiplier)
    tx = saddle_point(inner, budget, initial_multiplier=multiplier)
    trainer = host.train(module, tx, data, steps, **settings)
    info = eu.surgery_info(nnx.as_pure(trainer.optimizer.opt_state))
    assert trainer.optimizer.step[...] == steps * (settings.get("accumulated", 4) or 1)
    assert int(info.skipped_steps) == 0
    return nnx.as_pure(nnx.state(module, nnx.LoRAParam)), info


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tunix_forgets_and_says_which_budgets_are_kept(tunix_peft, learned_llama, capsys):
    """A trainer takes nothing back at the end, and this model's losses are noisy: what is over is said."""
    outcome = tunix_peft.main(learned_llama, TINY_LENGTH, steps=60, rate=1e-3)
    before, after = outcome.given
    assert before > 0.7 * outcome.tokens
    assert after < 0.7 * before
    said = capsys.readouterr().out
    assert f"of the {outcome.tokens} tokens of four answers it gave {before}, now {after}." in said
    assert said.count("is kept: the loss rose by") == np.sum(outcome.rises <= 0.1)
    assert outcome.rises.max() < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tunix_computes_what_the_files_say(tunix_peft, learned_llama):
    """Tunix's own default of rope_theta would be 100 times that of this model."""
    config, params = files.load(learned_llama)
    tokens = tunix_peft.load_sets(learned_llama, TINY_LENGTH)["prose"].tokens[:2]
    expected = llama.logits(config, params, tokens)
    found = tunix_peft.predict(tunix_peft.load(learned_llama), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tunix_accumulates_to_the_undivided_batch(tunix_peft, learned_llama):
    micro = list(itertools.islice(tunix_batches(tunix_peft, learned_llama, size=1), 20))
    whole = [
        jax.tree.map(lambda *parts: np.concatenate(parts), *micro[at : at + 4]) for at in range(0, 20, 4)
    ]
    divided = tunix_run(tunix_peft, learned_llama, micro, 5, accumulated=4)
    undivided = tunix_run(tunix_peft, learned_llama, whole, 5, accumulated=None)
    chex.assert_trees_all_close(divided, undivided, rtol=1e-5, atol=1e-6)
    assert np.abs(undivided[1].multiplier - 1).min() > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tunix_goes_on_from_its_checkpoint(tunix_peft, learned_llama, tmp_path):
    data = list(tunix_batches(tunix_peft, learned_llama, size=1))
    once = tunix_run(tunix_peft, learned_llama, data, 4, folder=str(tmp_path / "once"))
    tunix_run(tunix_peft, learned_llama, data, 2, folder=str(tmp_path / "twice"))
    twice = tunix_run(tunix_peft, learned_llama, data, 4, folder=str(tmp_path / "twice"))
    chex.assert_trees_all_equal(twice, once)


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
