"""Several processes are one run: the same numbers, one folder, and none waits for one that has ended."""

import json
import os
import pathlib
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
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


class Case(NamedTuple):
    """What differs: the rows that each of two processes has, the constraint, the mesh, where params lie."""

    retain: list
    constraint: eu.Budget | eu.Tolerance
    mesh: tuple[int, ...] = (8,)
    axes: AxisType = AxisType.Auto
    interleaved: bool = False
    is_shared: bool = False
    spec: P = P()
    trainable: Callable[[str], bool] | None = None


TWO_SETS = [{"a": rows(46, 3), "b": rows(30, 5)}, {"a": rows(43, 4), "b": rows(28, 6)}]
CASES = {
    "budget, even, explicit axes": Case(
        retain=[rows(48, 3), rows(48, 4)], constraint=eu.Budget(0.02), axes=AxisType.Explicit,
        interleaved=True,
    ),
    "budget, uneven": Case(retain=[rows(46, 3), rows(43, 4)], constraint=eu.Budget(0.02)),
    "several sets, sharded": Case(retain=TWO_SETS, constraint=eu.Budget([0.02, 0.05]), spec=P("data")),
    "tolerance": Case(
        retain=[rows(46, 3), rows(43, 4)], constraint=eu.Tolerance(0.0, measure="lookahead"), mesh=(4, 2),
        spec=P(None, "model"), trainable=lambda path: path == "w",
    ),
    "one model in both": Case(
        retain=[rows(89, 3)] * 2, constraint=eu.Budget(0.02), mesh=(4, 2), spec=P(None, "model"),
        interleaved=True, is_shared=True,
    ),
}  # fmt: skip
FORGET = [rows(24, 1), rows(20, 2)]
HELD_OUT = [rows(32, 7), rows(32, 8)]


def run(case, forget, retain, held_out, folder=None, measured_on=None, **more):
    if isinstance(case.constraint, eu.Tolerance):
        held_out = measured_on = None
    devices = np.array(jax.devices())
    if case.interleaved:
        devices = devices.reshape(2, 4).T
    axes = (case.axes,) * len(case.mesh)
    mesh = Mesh(devices.reshape(case.mesh), ("data", "model")[: len(case.mesh)], axis_types=axes)
    params = PARAMS | {"w": jax.device_put(PARAMS["w"], NamedSharding(mesh, case.spec))}
    return eu.unlearn(
        losses_fn, params, forget, retain, optax.sgd(0.05, momentum=0.9), case.constraint, mesh=mesh,
        steps=STEPS, batch_size=ROWS, held_out=held_out, measured_on=measured_on, folder=folder, every=7,
        evaluate=lambda params: {"size": float(jnp.sum(params["w"] ** 2))},
        score=lambda metrics: min(metrics["step"], 35), trainable=case.trainable, **more,
    )  # fmt: skip


def plain(params, history):
    """What a run came to, in NumPy."""
    everywhere = NamedSharding(params["w"].sharding.mesh, P())
    gathered = jax.jit(lambda tree: tree, out_shardings=everywhere)(params)
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
    if case.is_shared:
        return plain(*run(case, FORGET[0], case.retain[0], HELD_OUT[0]))
    forget = together(
        [batches.forget_source(data, ROWS // 2, drawn_by(part)) for part, data in enumerate(FORGET)]
    )
    draw = of_both_retain(case.retain)
    if "x" in case.retain[0]:
        whole = in_rounds(case.retain, ROWS // 2)
    else:
        whole = {name: in_rounds([part[name] for part in case.retain], ROWS // 2) for name in "ab"}
    held_out = in_rounds(HELD_OUT, 1) if "x" in case.retain[0] else None
    with monkeypatch.context() as patch:
        patch.setattr(promise, "several_source", lambda retain, seed: draw)
        return plain(*run(case, forget, draw, held_out, measured_on=whole))


def work_on_cases(index, path):
    found = {}
    for name, case in CASES.items():
        part = 0 if case.is_shared else index
        held_out = HELD_OUT[part] if "x" in case.retain[0] else None
        found[name] = plain(*run(case, FORGET[part], case.retain[part], held_out, folder=f"{path}/{name}"))
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
    saved = load_file(folder / "params.safetensors")
    jax.tree.map(np.testing.assert_array_equal, saved, {name: params[name] for name in saved})
    assert "w" in saved
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" not in line] == list(range(1, STEPS + 1))
    assert [line["evaluation"] for line in lines if "evaluation" in line] == evaluations
    np.testing.assert_array_equal(
        [line["multiplier"] for line in lines if "evaluation" not in line], steps["multiplier"]
    )
    if of_promise is not None:
        written = json.loads((folder / "promise.json").read_text())
        np.testing.assert_array_equal(written["rise"], of_promise["rise"])


# What processes tell each other: here threads of one, with a store that behaves like JAX's.


class Store:
    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values, key
            self.values[key] = value
            self.changed.notify_all()

    def key_value_delete(self, key):
        with self.changed:
            del self.values[key]

    def key_value_dir_get(self, place):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(place)]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]


@pytest.fixture
def store(monkeypatch):
    store = Store()
    state = SimpleNamespace(client=store, process_id=0)
    monkeypatch.setattr(processes, "distributed", SimpleNamespace(global_state=state))
    return store


def in_threads(*works) -> list[Any]:
    """What each work comes to, called with its own `Processes` of one run; an error as a value."""
    own = [Processes(index=index, parts=tuple(range(len(works)))) for index in range(len(works))]
    for each in own:
        each._name = own[0]._name

    def run(each, work):
        try:
            with each:
                return work(each)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, own, works))


def test_each_process_gets_what_all_have(store):
    def work(own):
        found = [own.each(lambda step=step: [own.index, step]) for step in range(20)]
        assert own.first(lambda: own.index) == own.alone(lambda: 0) == 0
        assert own.by_part(own.part) == [0, 1, 2]
        return found

    first, *others = in_threads(work, work, work)
    assert first == [[[process, step] for process in range(3)] for step in range(20)]
    assert others == [first, first]
    assert len(store.values) == 3, "what all have read is gone"


@pytest.mark.usefixtures("store")
def test_an_error_is_told_to_those_who_wait():
    def failing(own):
        own.each(lambda: 0)
        own.each(lambda: 1 // own.index)

    first, second = in_threads(failing, failing)
    assert isinstance(first, ZeroDivisionError)
    assert str(second).startswith("process 0 has ended, and so do all: ZeroDivisionError: ")


def test_a_process_whose_program_is_over_is_not_waited_for(store):
    processes._say_that_it_ends()
    ends = in_threads(lambda own: None, lambda own: own.each(lambda: 0))
    assert str(ends[1]) == "process 0 has ended, and so do all: its program is over"


@pytest.mark.usefixtures("store")
def test_batches_are_taken_as_far_as_all_have_them():
    def source(end):
        def batch(step):
            if step == end:
                raise OSError(f"no row {step}")
            return step

        return batch

    ends = in_threads(
        *[lambda own, end=end: steps_before(own.drawn(source(end), range(5, 12))) for end in (10, None, 8)]
    )
    assert [taken for taken, _ in ends] == [[5, 6, 7]] * 3
    ended = "process 0 has no more data, and so all end: no row 10"
    assert [said for _, said in ends] == ["no row 10", ended, "no row 8"]
    whole = in_threads(*[lambda own: list(own.drawn(source(None), range(5, 12)))] * 2)
    assert whole == [[5, 6, 7, 8, 9, 10, 11]] * 2


def steps_before(drawn):
    """What is drawn until an error, and the error."""
    taken = []
    try:
        for each in drawn:
            taken.append(each)
    except (OSError, RuntimeError) as error:
        return taken, str(error)
    return taken, None


@pytest.mark.usefixtures("store")
def test_what_must_be_the_same_is_compared():
    work = lambda rate: lambda own: own.check_same(steps=3, rate=rate)
    assert in_threads(work(0.1), work(0.1)) == [None, None]
    ends = {str(end) for end in in_threads(work(0.1), work(0.2))}
    assert ends == {
        "rate is 0.1 in process 0 and 0.2 in process 1: give all processes the same, but for their rows"
    }


@pytest.mark.usefixtures("store")
def test_what_failed_is_saved_where_all_are_of_one_step(monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.1)
    agree = lambda step: lambda own: own.agree(step)
    assert in_threads(agree(3), agree(3)) == [True, True]
    assert in_threads(agree(3), agree(4)) == [False, False]
    assert in_threads(agree(3), agree(None)) == [False, False]
    assert in_threads(agree(3), lambda own: None) == [False, None]


@pytest.mark.usefixtures("store")
def test_a_process_that_waits_elsewhere_is_ended(monkeypatch, capsys):
    """In computing, say, where nothing but the end of its process ends it."""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.1)
    ended = threading.Event()
    monkeypatch.setattr(processes.os, "_exit", lambda code: ended.set())
    in_threads(lambda own: ended.wait(20), lambda own: own.tell(OSError("disk unplugged")))
    assert ended.is_set()
    assert "process 0 ends: process 1 has ended" in capsys.readouterr().err


def mesh_over(monkeypatch, holders) -> Any:
    """A mesh whose devices belong to these processes."""
    holders = np.asarray(holders)
    devices = np.vectorize(lambda process: SimpleNamespace(process_index=process), otypes=[object])(holders)
    monkeypatch.setattr(jax, "process_count", lambda: holders.max() + 1)
    return SimpleNamespace(devices=devices, axis_names=("data", "model")[: holders.ndim])


@pytest.mark.parametrize(
    ("holders", "parts"),
    [
        ([0, 0, 1, 1], [0, 1]),
        ([1, 1, 0, 0], [1, 0]),
        ([0, 1, 0, 1], [0, 1]),
        ([[0, 0], [1, 1]], [0, 1]),
        ([[0, 1], [0, 1]], [0, 0]),
        ([[0, 1], [2, 3]], [0, 0, 1, 1]),
        ([[0, 0, 0, 0]], [0]),
    ],
)
def test_the_part_of_a_batch_that_a_process_gives(monkeypatch, holders, parts):
    mesh = mesh_over(monkeypatch, holders)
    for index, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        own = processes_of(mesh)
        assert (own.index, own.count, own.part, own.parts) == (index, len(parts), part, len(set(parts)))


@pytest.mark.parametrize("holders", [[0, 0, 0, 1], [[0, 1], [1, 1]], [[0, 1], [1, 2]], [0, 0, 2, 2]])
def test_a_mesh_that_does_not_part_the_rows_evenly_is_refused(monkeypatch, holders):
    with pytest.raises(ValueError, match="mesh must part its first axis, 'data', evenly among the processes"):
        processes_of(mesh_over(monkeypatch, holders))


def test_several_processes_need_a_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="mesh must be given where there are several processes, here 2"):
        small_run(0, mesh=None)


@given(st.lists(st.integers(3, 20), min_size=1, max_size=3), st.integers(1, 3))
def test_every_row_of_every_part_is_measured_once(lengths, size):
    parts = tuple(range(len(lengths)))
    data = [np.arange(length) for length in lengths]
    seen, counted = [[] for _ in parts], []
    for part in parts:
        own = Processes(index=part, parts=parts)
        own.by_part = lambda value: [{"retain": length} for length in lengths]
        own.rows_left = lambda batch, size, amounts, part=part: batch[: amounts[part]]
        for batch, amounts in batches.in_order(batches.retain_sets(data[part], size), own):
            seen[part].extend(batch)
            counted.append(amounts[0])
    for found, rows in zip(seen, data, strict=True):
        np.testing.assert_array_equal(found, rows)
    assert sum(counted) == len(parts) * sum(lengths), "in each process those of all"


def test_parts_are_drawn_from_seeds_of_their_own():
    seeds = [Processes(index=part, parts=(0, 1, 2)).own_seed(seed) for part in range(3) for seed in range(3)]
    assert len(set(seeds)) == 9
    assert Processes(index=1, parts=(0, 0)).own_seed(5) == Processes().own_seed(5) == 5


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
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return eu.unlearn(
        losses_fn, PARAMS, forget or FORGET[index], case.retain[index], optax.sgd(0.05), eu.Budget(0.02),
        folder=folder, **{"steps": 20, "batch_size": ROWS, "every": 10, "mesh": mesh} | settings,
    )  # fmt: skip


def work_on_failures(index, path):
    """Each of these ends the run in both processes, and leaves them free to start another."""
    said = {}

    def failing(name, **settings):
        began = time.monotonic()
        with pytest.raises((RuntimeError, TypeError, ValueError, OSError, KeyboardInterrupt)) as raised:
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

    def interrupt(params, metrics):
        if metrics["step"] == 10 and index:
            signal.raise_signal(signal.SIGINT)

    # A suite that was started in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failing("interrupt", callbacks=[interrupt])
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
    assert second["interrupt"][0] == "KeyboardInterrupt"
    assert first["interrupt"][1] == ended.format(1, "KeyboardInterrupt: ")
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
        assert "forget is given in process 0 and a function in process 1: give" in said["kind"][1]
        assert said["mesh"][1].startswith("mesh must be given where there are several processes, here 2")
        assert "mesh must part its first axis, 'data', evenly" in said["half a mesh"][1]
        assert "not empty and not that of a run" in said["folder"][1]
        assert max(seconds for _, _, seconds in said.values()) < 30
        assert max(len(message) for _, message, _ in said.values()) < 600 + len(str(tmp_path))


def work_until_the_end(index, path, who, how):
    """A process that dies, or that raises where the other waits for it on the devices."""
    processes.GRACE_SECONDS = 5.0  # the test need not wait as long as a user's run

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
        assert "process 0 ends: process 1 has ended, and for 5 seconds this one has waited" in said[0]


def work_on_a_long_run(index, folder):
    case = CASES["several sets, sharded"]
    slowly = [lambda params, metrics: time.sleep(0.1)]
    end = plain(*run(case, FORGET[index], case.retain[index], None, folder=folder, callbacks=slowly))
    pathlib.Path(f"{folder}.{index}.pickle").write_bytes(pickle.dumps(end))


@pytest.mark.slow
def test_one_process_killed_at_any_moment(tmp_path):
    """SIGKILLs of either process; the others end, all start again, and no bit of the end is another."""
    moments = random.Random(0)
    saved = lambda: {path.name for path in (tmp_path / "killed" / "checkpoints").glob("*")}
    for kill in range(2):
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
