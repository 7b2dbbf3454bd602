"""The benchmarks' own pieces: that rows do the same work, how they are timed, and what is made of it."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import growth, models, peers, report, study, whole_runs
from experiments.benchmarks.models import cnn, decoder, diffusion_transformer, in_one_pass, in_two_passes, mlp
from experiments.benchmarks.steps import (
    BUDGET,
    DIRECTIONAL,
    EXACT,
    EXACT_SHARED,
    FLOOR,
    GUARDED,
    LAGGED,
    LAGRANGIAN,
    LOOKAHEAD,
    steps_of,
)
from experiments.benchmarks.timing import interleaved, ratios, scanned, start
from tests.costs import compile_step
from tests.representatives import slow_unless

needs_torch = pytest.mark.skipif(bool(peers.missing()), reason='the extra "benchmarks" is not installed')

SMALL = {
    "mlp": lambda: mlp((8, 16, 4), 8, 2),
    "cnn": lambda: cnn(True, 4, 2, width=4, stages=2, size=8),
    "dit": lambda: diffusion_transformer(dataclasses.replace(models.DIT, size=8, width=8, layers=1), 4, 2),
    "llama": lambda: decoder(models.TINY_LLAMA, False, 2, 8, 2),
    "adapters": lambda: decoder(models.TINY_LLAMA, True, 2, 8, 2),
}


def batch_of(model):
    return {"frozen": model.init().frozen, **model.batch}


@pytest.mark.parametrize("name", slow_unless(["mlp"], SMALL))
def test_one_pass_and_two_passes_see_the_same_losses(name):
    model = SMALL[name]()
    trained, batch = model.init().trained, batch_of(model)
    apart, together = (passes(model)(trained, batch) for passes in (in_two_passes, in_one_pass))
    np.testing.assert_allclose(apart, together, rtol=1e-5)
    assert apart.forget > 0.001
    assert apart.retain > 0.1


def test_utilities_are_groups_of_retain_rows():
    model = SMALL["mlp"]()
    trained, batch = model.init().trained, batch_of(model)
    whole = in_two_passes(model)(trained, batch)
    groups = in_two_passes(model, 4)(trained, batch)
    assert groups.retain.shape == (4,)
    np.testing.assert_allclose(groups.retain.mean(), whole.retain, rtol=1e-6)
    last = {**batch, "retain": jax.tree.map(lambda leaf: leaf[-2:], batch["retain"])}
    alone = in_two_passes(model)(trained, last)
    np.testing.assert_allclose(groups.retain[-1], alone.retain, rtol=1e-6)


def test_the_floor_is_the_first_row():
    assert next(iter(steps_of(SMALL["mlp"]()))) == FLOOR


@pytest.mark.parametrize("name", slow_unless([LAGGED], steps_of(SMALL["mlp"]())))
def test_a_row_moves_the_parameters_and_a_scan_is_its_calls(name):
    model = SMALL["mlp"]()
    trained, batch = model.init().trained, batch_of(model)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), model.batch)
    step = steps_of(model)[name]
    carry, taken = start(step, trained), jax.jit(step.step)
    for _ in range(3):
        carry = taken(carry, batch)
    many = jax.jit(scanned(step))(start(step, trained), ({}, stacked))
    first = lambda carry: jax.tree.leaves(carry)[0]
    assert np.abs(first(carry) - jax.tree.leaves(trained)[0]).max() > 0
    np.testing.assert_allclose(first(many), first(carry), rtol=1e-6)


@pytest.mark.slow
def test_the_cost_of_rows_beside_the_floor():
    """What holds on any machine: operations, bytes and memory of the compiled programs."""
    model = mlp((64, 256, 256, 10), 64, 1)
    trained, batch = model.init().trained, batch_of(model)
    found = {}
    for name, step in steps_of(model).items():
        if name == GUARDED:
            continue
        carry = start(step, trained)
        program = compile_step(step.step, carry, batch, donate=(0,))
        costs, memory = program.cost_analysis(), program.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        found[name] = np.array([costs["flops"], costs["bytes accessed"], peak - memory.alias_size_in_bytes])
        # Nothing is asked of the host within a step.
        assert "callback" not in program.as_text()
    over = {name: costs / found[FLOOR] for name, costs in found.items()}
    limits = {
        BUDGET: (1.02, 1.45, 1.15),
        LAGGED: (1.02, 1.45, 1.15),
        LAGRANGIAN: (1.02, 1.45, 1.15),
        LOOKAHEAD: (1.25, 1.9, 1.25),
        DIRECTIONAL: (1.35, 1.7, 1.25),
        EXACT: (1.05, 2.4, 1.8),
        EXACT_SHARED: (1.75, 2.1, 1.5),
    }
    for name, limit in limits.items():
        assert np.all(over[name] <= limit), (name, over[name])


def test_blocks_take_turns():
    calls = []
    blocks = {name: lambda steps, name=name: calls.append((name, steps)) for name in "abc"}
    parts = []
    seconds = interleaved(blocks, 5, 3, lambda what, part: parts.append(part))
    assert [name for name, steps in calls if steps == 5] == list("abcbcacab")
    # Each is warmed by a step of its own.
    assert calls[::2] == [(name, 1) for name, steps in calls[1::2]]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    np.testing.assert_allclose(sum(parts), 1)


def test_ratios_are_of_the_same_round():
    """A machine that is twice as slow in one round changes nothing."""
    spread = ratios([3.0, 6.0, 3.0], [2.0, 4.0, 2.0])
    assert spread == (1.5, 1.5, 1.5)
    assert ratios([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == (2.0, 1.5, 2.5)


def test_exponents():
    x = [1.0, 10.0, 100.0, 1000.0]
    np.testing.assert_allclose(growth.exponent(x, [7 * v**1.5 for v in x]), 1.5)
    # What is constant at first does not count.
    np.testing.assert_allclose(growth.exponent(x, [1e4, 1e2, 1e4, 1e6]), 2)


def test_sizes_on_the_axis_of_parameters_are_as_said():
    for value in growth.SIDES:
        shapes = jax.eval_shape(growth.of_size(value).init)
        assert abs(models.count(shapes.trained) / value - 1) < 0.02


def record_of(floor, lagged, flops):
    """A model's record in which every row but lagged EUPMU is the floor."""
    costs = {"bytes_accessed": 10.0, "peak_bytes": 100.0, "compile_seconds": 1.0, "temporary_bytes": 1.0}
    rows = {FLOOR: floor, LAGGED: lagged, LOOKAHEAD: floor}
    return {
        "parameters": 10,
        "frozen": 0,
        "costs": {name: costs | {"flops": flops if name == LAGGED else 100.0} for name in rows},
        "seconds": {"calls": rows, "scan": {FLOOR: floor}},
    }


def test_goals():
    near, far = "tiny MLP", "MLP"
    # A resumed run may have measured them in any order.
    records = {
        ("model", far): {"key": ["model", far]} | record_of([1.0, 1.0, 1.0], [1.5, 1.5, 1.5], 101.0),
        ("model", near): {"key": ["model", near]} | record_of([1.0, 2.0, 1.0], [1.01, 2.02, 1.01], 101.0),
    }
    runs = [{"key": ["run", near], "unlearn": [1.2], "bare": [1.0], "seconds": 9.0, "rest": 1.0}]
    rows = report.rows_frame(records)
    assert list(dict.fromkeys(rows["model"])) == [near, far]
    goals = {goal.text: goal for goal in report.goals_of(rows, runs)}
    assert goals[f"{LAGGED}, FLOPs"].kept
    slow = goals[f"{LAGGED}, calls"]
    assert not slow.kept
    assert slow.line() == {"goal": "<= 1.02", "kept on": "1 of 2 models", "worst": "1.500 (MLP)"}
    assert not goals["unlearn over its bare steps, a step"].kept
    # Where no peer was measured, none was beaten.
    assert not any("TorchJD" in text for text in goals)
    text = report.verdict(list(goals.values()))
    assert text.startswith(f"{len(goals) - 2} of {len(goals)} goals are kept on every model. Missed: ")
    assert f"{LAGGED}, calls;" in text


def test_without_pytorch_the_page_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert set(peers.missing()) == {"torch", "torchjd", "cooper"}
    assert peers.blocks_of(SMALL["mlp"]()) == {}


@pytest.mark.slow
def test_a_run_of_unlearn_beside_its_bare_steps():
    parts = []
    found = whole_runs.measure(mlp((4, 2), 4, 3), 2, lambda what, part: parts.append(part))
    assert len(found["unlearn"]) == len(found["bare"]) == 2
    assert all(seconds > 0 for seconds in found["unlearn"] + found["bare"])
    np.testing.assert_allclose(sum(parts), 1)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("name", SMALL)
def test_the_models_of_pytorch_are_the_same_functions(name):
    from experiments.benchmarks import torch_steps

    model = SMALL[name]()
    task = torch_steps.task_of(model)
    losses = in_two_passes(model)(model.init().trained, batch_of(model))
    np.testing.assert_allclose(task.forget_loss().item(), losses.forget, rtol=2e-5)
    np.testing.assert_allclose(task.retain_loss().item(), losses.retain, rtol=2e-5)


@pytest.mark.slow
@needs_torch
def test_the_steps_of_pytorch():
    """The floor is the same step as in JAX."""
    from experiments.benchmarks import torch_steps

    model = SMALL["mlp"]()
    trained, batch = model.init().trained, batch_of(model)
    floor = steps_of(model)[FLOOR]
    carry = start(floor, trained)
    for _ in range(3):
        carry = floor.step(carry, batch)
    task = torch_steps.task_of(model)
    step = torch_steps.scalarised(task)
    for _ in range(3):
        step()
    for ours, theirs, before in zip(
        jax.tree.leaves(carry[0]), task.params, jax.tree.leaves(trained), strict=True
    ):
        moved = theirs.detach().numpy() - before
        np.testing.assert_allclose(moved, ours - before, rtol=1e-3, atol=1e-8)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("name", SMALL)
def test_every_peer_moves_all_parameters(name):
    from experiments.benchmarks import torch_steps

    for peer, take in torch_steps.peers_of(SMALL[name]()).items():
        before = [leaf.detach().clone() for leaf in take.task.params]
        take.step()
        moved = [(leaf != old).any() for leaf, old in zip(take.task.params, before, strict=True)]
        # The other matrix of a new adapter is 0: this one has no gradient yet.
        assert all(moved) or name == "adapters", peer


@pytest.mark.slow
def test_the_study_end_to_end(tmp_path, monkeypatch):
    path = benchmarks.main(benchmarks.Config(smoke=True, runs_dir=tmp_path))
    assert {file.name for file in path.iterdir()} >= {
        "rows.csv",
        "growth.csv",
        "times.png",
        "growth.png",
        "tables.md",
        "report.html",
    }
    page = (path / "tables.md").read_text()
    for name in (*steps_of(SMALL["mlp"]()), *models.SMOKE, "goals are kept on every model"):
        assert name in page
    for names in peers.missing().values():
        assert all(name in page for name in names)
    keys = [json.loads(line)["key"] for line in (path / "records.jsonl").read_text().splitlines()]
    assert len(keys) == len({tuple(key) for key in keys})

    # What is finished is not measured again.
    def fail(*arguments):
        raise AssertionError("measured again")

    for module in (study, growth, whole_runs):
        monkeypatch.setattr(module, "measure", fail)
    assert benchmarks.main(benchmarks.Config(smoke=True, runs_dir=tmp_path), path) == path
