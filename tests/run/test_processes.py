"""Several processes are one run: the same numbers, one folder, and none waits for one that has ended."""

import itertools
import json
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eupmu_jax as eu
from eupmu_jax.run import batches, processes, promise
from eupmu_jax.run.processes import Processes, processes_of
from tests.processes import finish, join, start, wait

STEPS, ROWS = 40, 16
TRUE = np.random.default_rng(9).normal(size=8)
# A model that knows the labels, so that unlearning some of them costs something.
PARAMS = {"w": np.stack([-TRUE, TRUE], 1), "b": np.zeros(2)}


def rows(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 8))
    return {"x": x, "y": (x @ TRUE > 0).astype(np.int64)}


def mesh_of(*shape, names=("data", "model")):
    return jax.make_mesh(shape, names[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def cross_entropy(params, part):
    logits = part["x"] @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, part["y"]).mean()


def losses_fn(params, batch):
    """With noise from the step's key, which all processes must share."""
    noise = 0.1 * jax.random.normal(batch["key"], ())
    wrong = batch["forget"] | {"y": 1 - batch["forget"]["y"]}
    retain = batch["retain"]
    parts = retain.values() if "x" not in retain else [retain]
    retain_loss = jnp.stack([cross_entropy(params, part) for part in parts])
    return eu.Losses(
        (1 + noise) * cross_entropy(params, wrong), retain_loss if "x" not in retain else retain_loss[0]
    )


# One run, on two processes or on one.


class Case(SimpleNamespace):
    """What differs: the rows that each of two processes has, the constraint, the mesh, where params lie."""


TWO_SETS = [{"a": rows(46, 3), "b": rows(30, 5)}, {"a": rows(43, 4), "b": rows(28, 6)}]
CASES = {
    "budget, even": Case(retain=[rows(48, 3), rows(48, 4)], constraint=eu.Budget(0.02)),
    "budget, uneven": Case(retain=[rows(46, 3), rows(43, 4)], constraint=eu.Budget(0.02)),
    "several sets, sharded": Case(retain=TWO_SETS, constraint=eu.Budget([0.02, 0.05]), spec=P("data")),
    "tolerance": Case(
        retain=[rows(46, 3), rows(43, 4)], constraint=eu.Tolerance(0.0, measure="lookahead"), mesh=(4, 2),
        spec=P(None, "model"),
    ),
}  # fmt: skip
FORGET = [rows(24, 1), rows(20, 2)]
HELD_OUT = [rows(32, 7), rows(32, 8)]


def run(case, forget, retain, held_out, folder=None, **more):
    mesh = mesh_of(*getattr(case, "mesh", (8,)))
    placed = NamedSharding(mesh, getattr(case, "spec", P()))
    params = PARAMS | {"w": jax.device_put(PARAMS["w"], placed)}
    return eu.unlearn(
        losses_fn, params, forget, retain, optax.sgd(0.05, momentum=0.9), case.constraint, mesh=mesh,
        steps=STEPS, batch_size=ROWS, held_out=held_out, folder=folder, every=7,
        evaluate=lambda params: {"size": float(jnp.sum(params["w"] ** 2))},
        score=lambda metrics: min(metrics["step"], 35), **more,
    )  # fmt: skip


def plain(params, history):
    """What a run came to, in NumPy."""
    gathered = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh_of(8), P()))(params)
    of_promise = None if history.promise is None else history.promise._asdict()
    return jax.device_get(gathered), history.steps, history.evaluations, history.best_step, of_promise


def drawn_by(part):
    return Processes(index=part, parts=(0, 1)).own_seed(0)


def together(sources):
    return lambda step: jax.tree.map(lambda *parts: np.concatenate(parts), *(draw(step) for draw in sources))


def of_both_retain(parts):
    """The retain batches that two processes draw, in one."""
    return together(
        [
            batches.several_source(batches.retain_sets(data, ROWS // 2), drawn_by(part))
            for part, data in enumerate(parts)
        ]
    )


def in_rounds(parts, size):
    """The rows of both in the order in which two processes go through them together."""
    lengths = [len(part["y"]) for part in parts]
    starts = range(0, max(lengths), size)
    order = [(part, slice(start, start + size)) for start in starts for part in (0, 1)]
    return {key: np.concatenate([parts[part][key][rows] for part, rows in order]) for key in parts[0]}


def on_one_process(case, monkeypatch):
    """The same rows at each step, in the evaluation and in the repair."""
    forget = together(
        [batches.forget_source(data, ROWS // 2, drawn_by(part)) for part, data in enumerate(FORGET)]
    )
    draw = of_both_retain(case.retain)
    if "x" in case.retain[0]:
        whole = in_rounds(case.retain, ROWS // 2)
    else:
        whole = {name: in_rounds([part[name] for part in case.retain], ROWS // 2) for name in "ab"}
    monkeypatch.setattr(promise, "several_source", lambda retain, seed: draw)
    held_out = in_rounds(HELD_OUT, 1) if "x" in case.retain[0] else None
    return plain(*run(case, forget, draw, held_out, measured_on=whole))


def work_on_cases(index, path):
    found = {}
    for name, case in CASES.items():
        held_out = HELD_OUT[index] if "x" in case.retain[0] else None
        found[name] = plain(*run(case, FORGET[index], case.retain[index], held_out, folder=f"{path}/{name}"))
    pathlib.Path(f"{path}/{index}.pickle").write_bytes(pickle.dumps(found))


@pytest.mark.slow
def test_two_processes_give_the_answer_of_one(x64, tmp_path, monkeypatch):
    finish(__file__, "cases", str(tmp_path))
    first, second = (pickle.loads((tmp_path / f"{i}.pickle").read_bytes()) for i in range(2))
    for name, case in CASES.items():
        one = on_one_process(case, monkeypatch)
        for got in (first[name], second[name]):
            assert jax.tree.structure(got) == jax.tree.structure(one)
            for a, b in zip(*map(jax.tree.leaves, (one, got)), strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12, err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, first[name], second[name])
        check_folder(tmp_path / name, first[name])
    assert first["budget, uneven"][-1]["examples"] == 89
    assert first["budget, uneven"][-1]["repair_steps"] > 0, "or the repair is not compared"
    assert first["several sets, sharded"][-1]["examples"] == 147
    whole = {key: np.concatenate([part[key] for part in CASES["budget, uneven"].retain]) for key in "xy"}
    np.testing.assert_allclose(
        first["budget, uneven"][-1]["baseline"], cross_entropy(PARAMS, whole), rtol=2e-7
    )


def check_folder(folder, result):
    """Written once, and whole."""
    from safetensors.numpy import load_file

    params, steps, evaluations, _, of_promise = result
    jax.tree.map(np.testing.assert_array_equal, load_file(folder / "params.safetensors"), params)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" not in line] == list(range(1, STEPS + 1))
    assert [line["evaluation"] for line in lines if "evaluation" in line] == evaluations
    np.testing.assert_array_equal(
        [line["multiplier"] for line in lines if "evaluation" not in line], steps["multiplier"]
    )
    if of_promise is not None:
        written = json.loads((folder / "promise.json").read_text())
        np.testing.assert_array_equal(written["rise"], of_promise["rise"])


# Ends, good and bad.


def ending(at, error):
    """Forget rows that end at a step."""
    draw = batches.forget_source(FORGET[0], ROWS // 2, 0)

    def batch(step):
        if step == at:
            raise error
        return draw(step)

    return batch


def small_run(index, folder=None, forget=None, **settings):
    case = CASES["budget, uneven"]
    return eu.unlearn(
        losses_fn, PARAMS, forget or FORGET[index], case.retain[index], optax.sgd(0.05), eu.Budget(0.02),
        folder=folder, **{"steps": 20, "batch_size": ROWS, "every": 10, "mesh": mesh_of(8)} | settings,
    )  # fmt: skip


def work_on_failures(index, path):
    """Each of these ends the run in both processes, and leaves them free to start another."""
    said = {}

    def failing(name, **settings):
        began = time.monotonic()
        with pytest.raises((RuntimeError, TypeError, ValueError, OSError)) as raised:
            small_run(index, **settings)
        said[name] = (type(raised.value).__name__, str(raised.value), time.monotonic() - began)

    draw = ending(None, None)
    unplugged = ending(17, OSError("disk unplugged"))
    failing("data", forget=unplugged if index else draw, folder=f"{path}/data")
    said["saved"] = sorted(int(saved.name) for saved in pathlib.Path(f"{path}/data/checkpoints").iterdir())
    resumed = plain(*small_run(index, forget=draw, folder=f"{path}/data"))
    jax.tree.map(np.testing.assert_array_equal, resumed, plain(*small_run(index, forget=draw)))

    def callback(params, metrics):
        if metrics["step"] == 10 and not index:
            raise OSError("no plot")

    failing("callback", callbacks=[callback], folder=f"{path}/callback")
    failing("evaluate", evaluate=lambda params: {} if index else None)
    failing("rows", forget=FORGET[0] if index else {"x": np.zeros((5, 8)), "y": np.zeros(5, int)})
    spoilt = FORGET[1] | {"x": np.where(np.arange(20)[:, None] == 3, np.nan, FORGET[1]["x"])}
    failing("not finite", forget=spoilt if index else FORGET[0])
    failing("settings", steps=20 + index)
    failing("kind", forget=draw if index else FORGET[0])
    failing("mesh", mesh=None)
    failing("half a mesh", mesh=jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4]))
    pathlib.Path(f"{path}/foreign").mkdir(exist_ok=True)
    (pathlib.Path(f"{path}/foreign") / "thesis.tex").touch()
    failing("folder", folder=f"{path}/foreign")
    pathlib.Path(f"{path}/{index}.json").write_text(json.dumps(said))
    if index == 0:
        failing("gone")
        pathlib.Path(f"{path}/gone").write_text(said["gone"][1])


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path):
    finish(__file__, "failures", str(tmp_path))
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    unplugged = "the forget data of step 17 could not be had: disk unplugged"
    assert second["data"][:2] == ["RuntimeError", unplugged]
    assert first["data"][1] == f"process 1 has no more data, and so all end: {unplugged}"
    assert first.pop("saved") == second.pop("saved") == [10, 17]
    ended = "process {} has ended, and so do all: {}"
    assert (tmp_path / "gone").read_text() == ended.format(1, "its program is over")
    assert first["callback"][:2] == ["OSError", "no plot"]
    assert second["callback"][1] == ended.format(0, "OSError: no plot")
    assert "evaluate must return a dict" in first["evaluate"][1]
    assert second["evaluate"][1] == ended.format(0, f"TypeError: {first['evaluate'][1]}")
    short = "batch_size 16 takes 8 rows of each process, but forget has 5 in process 0"
    assert short in first["rows"][1]
    assert short in second["rows"][1]
    assert second["not finite"][0] == "ValueError"
    assert "forget holds NaN or infinity in 1 of its 20 rows, of which row 3" in second["not finite"][1]
    assert second["not finite"][1][:100] in first["not finite"][1]
    for said in first, second:
        assert "plan is {'steps': 20, " in said["settings"][1]
        assert "{'steps': 21, " in said["settings"][1]
        assert "give all processes the same" in said["settings"][1]
        assert said["kind"][1].startswith("forget is dict in process 0 and function in process 1: give all")
        assert said["mesh"][1].startswith("mesh must be given where there are several processes, here 2")
        assert "mesh must part its first axis, 'data', evenly" in said["half a mesh"][1]
        assert "not empty and not that of a run" in said["folder"][1]
        assert max(seconds for _, _, seconds in said.values()) < 30
        assert max(len(message) for _, message, _ in said.values()) < 600 + len(str(tmp_path))


def work_until_the_end(index, path, who, how):
    """A process that dies, or that raises where the other waits for it on the devices."""

    def evaluate(params):
        if index == int(who) and float(params["b"][0]) != 0:
            pathlib.Path(f"{path}/ended").touch()
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("no such file")
        return {"size": float(multihost_utils.process_allgather(np.ones(1)).sum())}

    small_run(index, evaluate=evaluate, folder=f"{path}/run")


@pytest.mark.slow
@pytest.mark.parametrize(("who", "how"), [(0, "killed"), (1, "killed"), (1, "raises")])
def test_none_waits_for_one_that_has_ended(tmp_path, who, how):
    started = start(__file__, "until the end", str(tmp_path), str(who), how)
    said = wait(started, 120)
    assert all(process.returncode for process in started)
    assert time.time() - (tmp_path / "ended").stat().st_mtime < 60
    if how == "raises":
        assert "OSError: no such file" in said[who]
        assert "process 0 ends: process 1 has ended, and for 30 seconds this one has waited" in said[0]


def work_on_a_long_run(index, folder):
    case = CASES["several sets, sharded"]
    slowly = [lambda params, metrics: time.sleep(0.1)]
    end = plain(*run(case, FORGET[index], case.retain[index], None, folder=folder, callbacks=slowly))
    pathlib.Path(f"{folder}.{index}.pickle").write_bytes(pickle.dumps(end))


@pytest.mark.slow
def test_one_process_killed_at_any_moment(tmp_path):
    """Five SIGKILLs of either process; the others end, all start again, and no bit of the end is another."""
    moments = random.Random(0)
    saved = lambda: {path.name for path in (tmp_path / "killed" / "checkpoints").glob("*")}
    for kill in range(5):
        started, before = start(__file__, "long", str(tmp_path / "killed")), saved()
        while all(process.poll() is None for process in started) and saved() == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        killed = moments.randrange(2)
        started[killed].send_signal(signal.SIGKILL)
        began = time.monotonic()
        wait(started, 60)
        assert started[killed].returncode == -signal.SIGKILL, f"done before kill {kill}"
        assert started[1 - killed].returncode
        assert time.monotonic() - began < 60
    finish(__file__, "long", str(tmp_path / "killed"))
    finish(__file__, "long", str(tmp_path / "whole"))
    ends = [
        pickle.loads((tmp_path / f"{name}.{index}.pickle").read_bytes())
        for name in ("killed", "whole")
        for index in (0, 1)
    ]
    for end in ends:
        jax.tree.map(np.testing.assert_array_equal, end, ends[0])


if __name__ == "__main__":
    index, (what, path, *more) = join()
    works = {
        "cases": work_on_cases,
        "failures": work_on_failures,
        "until the end": work_until_the_end,
        "long": work_on_a_long_run,
    }
    works[what](index, path, *more)
