"""The study of diffusion models: concepts, losses against NumPy, the judge, measures, whole runs."""

import json
import pickle
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu
from experiments.diffusion import (
    __main__,
    attacks,
    judge,
    losses,
    measures,
    methods,
    ready,
    report,
    seeds,
    study,
    tasks,
    unlearning,
)
from experiments.diffusion.judge import Seen
from experiments.diffusion.tasks import Concept
from experiments.shared.models.diffusion import training
from experiments.shared.models.diffusion.network import Network, make_network
from experiments.shared.models.diffusion.training import Pictures
from experiments.shared.models.files import save_params
from experiments.shared.models.lora import low_rank
from experiments.shared.records import read_records
from experiments.shared.report import ORIGINAL, RETRAIN
from tests.representatives import slow_unless

# A network that can be written down: what is asked for, plus a number times what it sees, plus the time.


def predict(params, x, t, asked, adapters=()):
    more = low_rank(adapters, "q_proj", asked)
    return (asked + more)[:, :, None, None] + params["slope"] * x + t[:, None, None, None]


NETWORK = Network(
    init=lambda key: {"value": jax.random.normal(key, (4,)), "slope": jnp.array(0.5)},
    embed=lambda params, labels: jax.nn.one_hot(labels[:, 0], 4) @ params["value"][:, None],
    predict=predict,
    new_adapter=lambda key, rank: {},
)
CONCEPT = Concept(0, 2, 1)
noised_pictures = jax.jit(training.noised_pictures)


def params_of(seed):
    rng = np.random.default_rng(seed)
    return {"value": jnp.asarray(rng.normal(size=4), jnp.float32), "slope": jnp.float32(rng.normal())}


def pictures_of(*labels, seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (len(labels), 2, 2, 1)).astype(np.float32)
    return Pictures(x, np.array(labels, np.int32)[:, None])


# Concepts and tasks


def test_a_concept_is_one_value_of_one_attribute():
    labels = np.array([[0, 2], [1, 2], [2, 1], [2, 2]])
    concept = Concept(1, 2, 0)
    assert concept.asked_for(labels).tolist() == [True, True, False, True]
    expected = [[0, 0], [1, 0], [2, 0], [2, 0]]
    assert concept.redirected(labels).tolist() == expected
    assert concept.redirected(jnp.asarray(labels)).tolist() == expected


TASK = tasks.load_task("digits", smoke=True)


def test_cifar10_from_its_folder(tmp_path):
    """A few pictures in its files: the full network is shaped by them, and the smoke one draws."""
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "test_batch"):
        batch = {b"data": rng.integers(0, 256, (20, 3072)).astype(np.uint8), b"labels": [0, 1] * 10}
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    task = tasks.load_task("cifar10", smoke=False, data_dir=tmp_path)
    network = make_network(task.make)
    params = jax.eval_shape(network.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *task.train.x.shape[1:]), jnp.float32)
    labels = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    asked = jax.eval_shape(network.embed, params, labels)
    t = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert jax.eval_shape(network.predict, params, x, t, asked).shape == x.shape == (2, 32, 32, 3)
    small = tasks.load_task("cifar10", smoke=True, data_dir=tmp_path)
    assert small.train.x.shape == (20, 32, 32, 3)
    assert small.concepts[0].asked_for(small.train.labels).sum() == 10
    with pytest.raises(ValueError, match="--data-dir"):
        tasks.load_task("cifar10", smoke=False)


def test_no_picture_to_forget_is_retained():
    for concept in TASK.concepts:
        sets = unlearning.sets_of(TASK, concept)
        assert (sets.forget.labels[:, 0] == concept.value).all()
        for part in (sets.retain, sets.held_out):
            assert not concept.asked_for(part.labels).any()
        assert len(sets.retain.x) % TASK.scale.batch_size == 0
        apart = {row.tobytes() for row in sets.held_out.x}
        assert not apart & {row.tobytes() for row in sets.retain.x}
        each = unlearning.grouped(concept, "each class", sets.retain, 7)
        assert sorted(each) == [f"class {value}" for value in range(10) if value != concept.value]
        assert all((part.labels == int(name[-1])).all() for name, part in each.items())
        assert all(len(part.x) % 7 == 0 for part in each.values())
        near = unlearning.grouped(concept._replace(near=(3, 9)), "near and far", sets.retain, 5)
        assert set(near["near"].labels.ravel()) == {3, 9}
        assert not set(near["far"].labels.ravel()) & {3, 9, concept.value}
        assert len(sets.retain.x) - sum(len(part.x) for part in near.values()) < 10


def test_prompts_ask_for_everything_equally_often():
    gone, kept = measures.prompts(TASK, TASK.concepts[0], 9)
    assert (gone == 8).all()
    assert gone.shape == (9, 1)
    assert np.bincount(kept[:, 0], minlength=10).tolist() == [3] * 8 + [0, 3]


# Losses


def by_hand(params, examples, labels):
    asked = np.where(labels >= 0, np.asarray(params["value"])[labels], 0)[:, 0]
    each = (1, 1, 1)
    return (
        asked.reshape(-1, *each)
        + float(params["slope"]) * np.asarray(examples.x)
        + np.asarray(examples.t).reshape(-1, *each)
    )


REDIRECTS = {
    "another": (losses.TO_ANOTHER, lambda p: p(1)),
    "nothing": (losses.TO_NOTHING, lambda p: p(-1)),
    "away": (losses.AWAY, lambda p: 2 * p(-1) - p(2)),
}

LOSSES = {
    name: jax.jit(losses.make_losses(NETWORK, CONCEPT, redirect)) for name, (redirect, _) in REDIRECTS.items()
}


@pytest.mark.parametrize("name", slow_unless(["away"], REDIRECTS))
def test_losses_against_numpy(name):
    combined = REDIRECTS[name][1]
    model = {"params": params_of(0), "original": params_of(1), "adapter": {}}
    forget, retain = pictures_of(2, 2, 2), {7: pictures_of(0, 3, seed=1), 5: pictures_of(1, 0, 3, seed=2)}
    key = jax.random.key(4)
    batch = {"forget": forget, "retain": retain, "key": key}
    losses_fn = LOSSES[name]
    found = losses_fn(model, batch)

    keys = jax.random.split(key)
    gone = noised_pictures(keys[0], forget)
    to = combined(lambda label: by_hand(model["original"], gone, np.full((3, 1), label)))
    square = (by_hand(model["params"], gone, forget.labels) - to) ** 2
    np.testing.assert_allclose(found.forget, square.mean(), rtol=1e-5)

    # In sorted order of the sets' names.
    joined = Pictures(*(np.concatenate(parts) for parts in zip(retain[5], retain[7], strict=True)))
    kept = noised_pictures(keys[1], joined)
    error = lambda params: ((by_hand(params, kept, joined.labels) - kept.target) ** 2).mean((1, 2, 3))
    rise = np.asarray(error(model["params"]) - error(model["original"]))
    np.testing.assert_allclose(found.retain, [rise[:3].mean(), rise[3:].mean()], rtol=1e-4, atol=1e-6)

    single = losses_fn(model, batch | {"retain": joined})
    np.testing.assert_allclose(single.retain, rise.mean(), rtol=1e-4, atol=1e-6)


def test_half_of_the_vectors_stay_and_half_are_around_them():
    asked = jnp.ones((400, 2))
    moved = np.ravel(losses.around(jax.random.key(0), asked) - asked)
    assert (moved == 0).mean() == pytest.approx(0.5, abs=0.1)
    assert np.std(moved[moved != 0]) == pytest.approx(losses.FURTHEST / 3**0.5, rel=0.2)


@pytest.mark.slow
def test_the_pictures_of_the_concept_are_redirected_whatever_is_asked():
    model = {"params": params_of(0), "original": params_of(1), "adapter": {}}
    batch = {"forget": pictures_of(*[2] * 40), "retain": pictures_of(0, 1), "key": jax.random.key(4)}
    losses_fn = losses.make_losses(NETWORK, CONCEPT, losses.TO_ANOTHER, whatever_asked=True)
    found = jax.jit(losses_fn)(model, batch)
    key = jax.random.split(batch["key"])[0]
    gone = noised_pictures(key, batch["forget"])
    asked = losses.around(jax.random.fold_in(key, 1), NETWORK.embed(model["params"], gone.labels))
    to = by_hand(model["original"], gone, np.full((40, 1), 1))
    prediction = NETWORK.predict(model["params"], gone.x, gone.t, asked)
    np.testing.assert_allclose(found.forget, ((np.asarray(prediction) - to) ** 2).mean(), rtol=1e-4)


def test_nothing_rose_at_first_and_only_the_model_has_gradients():
    original = params_of(1)
    batch = {"forget": pictures_of(2, 2), "retain": pictures_of(0, 1), "key": jax.random.key(0)}
    losses_fn = jax.jit(losses.make_losses(NETWORK, CONCEPT, losses.TO_ANOTHER))
    model = {"params": original, "original": original, "adapter": {}}
    found = losses_fn(model, batch)
    assert float(found.retain) == 0
    gap = float(original["value"][2] - original["value"][1])
    assert float(found.forget) == pytest.approx(gap**2, rel=1e-5)
    grads = jax.jit(jax.grad(lambda model: sum(losses_fn(model, batch))))(model)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["original"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["params"]))


def test_methods_of_others_see_the_same_losses():
    model = {"params": params_of(0), "original": params_of(1), "adapter": {}}
    forget, retain, key = pictures_of(2, 2, 2), pictures_of(0, 3, 1, 0, 3, seed=1), jax.random.key(4)
    batch = {"forget": forget, "retain": retain, "key": key}
    ours = LOSSES["away"](model, batch)
    theirs = losses.peer_losses(NETWORK, model["original"], CONCEPT, losses.AWAY)
    gone, kept = (noised_pictures(k, p) for k, p in zip(jax.random.split(key), (forget, retain), strict=True))
    assert float(theirs.forget(model["params"], gone)) == pytest.approx(float(ours.forget), rel=1e-5)
    rise = theirs.training(model["params"], kept) - theirs.training(model["original"], kept)
    assert float(rise.mean()) == pytest.approx(float(ours.retain), rel=1e-3)
    assert theirs.training(model["params"], forget).shape == (3,)
    assert float(theirs.divergence(model["params"], model["params"], gone)) == 0
    assert float(theirs.divergence(model["original"], model["params"], gone)) > 0


@pytest.mark.slow
def test_a_constant_weight_stays_and_nothing_of_the_retain_loss_is_seen_at_0():
    """Of the rows of the table: the multiplier that a method starts from is the one that it ends with."""
    sets = pictures_of(2, 2, 2, 2), pictures_of(0, 1, 3, 0, seed=1)
    for name, expected in (("constant weight", 1.0), ("redirect alone", 0.0)):
        method = methods.METHODS[name]
        original = params_of(1)
        model, history = eu.unlearn(
            losses.make_losses(NETWORK, CONCEPT, method.redirect),
            {"params": original, "original": original, "adapter": {}}, *sets, optax.sgd(0.1),
            method.constraint(np.float32(1)), steps=6, batch_size=2, initial_multiplier=method.multiplier,
            trainable=lambda path: path.startswith("params."),
        )  # fmt: skip
        assert set(history.steps["multiplier"].tolist()) == {expected}
        moved = np.abs(model["params"]["value"] - original["value"])
        assert moved[2] > 0.01
        assert bool(moved[0] > 0) == (expected > 0)


# The judge


def test_the_distance_of_gaussians():
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 2.0, 0.5])
    white = rng.normal(size=(4000, 3))
    white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    # Diagonal covariances commute: the distance is that of the standard deviations, and of the means.
    assert judge.distance(scale * white, scale * white + [3, 0, 4]) == pytest.approx(25, abs=1e-6)
    assert judge.distance(white, scale * white) == pytest.approx(((scale - 1) ** 2).sum(), abs=1e-6)
    turned = white @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert judge.distance(scale * white, scale * turned) > -1e-9
    assert judge.distance(white, white) == pytest.approx(0, abs=1e-9)


def test_the_judge_learns_every_attribute():
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(0, 3, 400), rng.integers(0, 2, 400)], -1).astype(np.int32)
    x = rng.normal(0, 0.1, (400, 2, 2, 1))
    x[:, 0, 0, 0] += labels[:, 0] - 1
    x[:, 1, 1, 0] += 2 * labels[:, 1] - 1
    made = judge.make_judge((3, 2), (2, 2, 1))
    params = made.train(Pictures(x.astype(np.float32), labels), 300, 0)
    seen = made.look(params, x.astype(np.float32))
    assert ((seen.labels == labels).mean(0) > 0.95).all()
    assert seen.features.shape == (400, 64)
    np.testing.assert_array_equal(seen.labels, made.labels(params, x.astype(np.float32)))


# Measures


def test_shares_by_hand():
    labels = np.array([[8], [3], [3], [8], [1]])
    seen = Seen(labels, np.zeros((5, 2)))
    assert measures.still(TASK.concepts[0], seen) == 0.4
    assert measures.shares(TASK, TASK.concepts[0], seen) == [0, 0.2, 0, 0.4, 0, 0, 0, 0, 0.4, 0]
    asked = np.array([[8], [3], [1], [1], [1]])
    assert measures.right(seen, asked, TASK.concepts[:1]) == 0.5
    assert measures.right(seen, asked, TASK.concepts) == 1.0
    assert measures.right_by_nearness(TASK.concepts[0], seen, asked) == {}
    found = measures.right_by_nearness(TASK.concepts[0]._replace(near=(3, 8)), seen, asked)
    assert found == {"right, near": 1.0, "right, far": pytest.approx(1 / 3)}


@pytest.mark.parametrize("amount", [1, 100, 230])
def test_parts_are_of_one_size_and_lose_no_row(amount):
    sizes = []

    def double(index, x, y):
        sizes.append(len(x))
        return 2 * x + y + 1000 * index

    x = np.arange(amount)
    found = measures.in_parts(double, x, x)
    np.testing.assert_array_equal(found, 3 * x + x // measures.ROWS_AT_ONCE * 1000)
    assert set(sizes) == {measures.ROWS_AT_ONCE}


def test_losses_are_of_the_same_noise_whatever_the_model():
    drawer = measures.make_drawer(NETWORK, (2, 2, 1))
    pictures = pictures_of(*[0, 1, 2, 3] * 505)
    first, other = params_of(0), params_of(1)
    of_first = drawer.losses(first, pictures)
    np.testing.assert_array_equal(of_first, drawer.losses(first, pictures))
    assert of_first.shape == (2020,)
    assert np.abs(of_first - drawer.losses(other, pictures)).max() > 0.01
    # E (p - v)^2 for a model that predicts 0: alpha^2 + sigma^2 x^2, on average (1 + x^2) / 2.
    none = {"value": jnp.zeros(4), "slope": jnp.zeros([])}
    zero = NETWORK._replace(predict=lambda params, x, t, asked: jnp.zeros_like(x))
    found = measures.make_drawer(zero, (2, 2, 1)).losses(none, pictures).mean()
    assert found == pytest.approx((1 + (pictures.x**2).mean()) / 2, rel=0.05)


def test_the_search_finds_what_denoises_best():
    """The prediction is what is asked for: its best constant value is the mean of the target."""
    plain = NETWORK._replace(predict=lambda params, x, t, asked: asked[:, :, None, None] * jnp.ones_like(x))
    ones = Pictures(np.ones((40, 2, 2, 1), np.float32), np.full((40, 1), 2, np.int32))
    made = attacks.make_attacks(plain, 0.0, 0.05)
    steps = attacks.steps_of(ones, 80, 32, seed=0)
    assert steps.pictures.x.shape == (80, 32, 2, 2, 1)
    along = made.search(params_of(0), jnp.array([1.0]), steps)
    assert along.shape == (attacks.LOOKS + 1, 1)
    assert float(along[0, 0]) == 1
    assert float(along[-1, 0]) == pytest.approx(-2 / np.pi, abs=0.15)
    # And at no rate nothing is relearned.
    found = made.relearn(params_of(0), attacks.steps_of(ones, 4, 32, seed=0))
    assert (np.asarray(found["value"]) == np.asarray(params_of(0)["value"])).all()


# Models that come with the results, tables, whole runs


def test_trained_models_come_back_in_single_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "FOLDER", tmp_path / "kept")
    assert ready.files("trousers") == {}
    (tmp_path / "models").mkdir()
    lines = []
    for name, key in ((ORIGINAL, ["train", ORIGINAL]), (RETRAIN, ["train", RETRAIN]), ("judge", ["judge"])):
        save_params(tmp_path / "models" / f"{name}.safetensors", {"a": {"b": jnp.array([1.0, 1e-3])}})
        lines.append(json.dumps({"key": key, "right": len(name)}))
    (tmp_path / "records.jsonl").write_text("\n".join([*lines, ""]))
    ready.write(tmp_path, "trousers")
    assert set(ready.files("trousers")) == {ORIGINAL, RETRAIN, "judge"}
    assert set(ready.files("shirt")) == {ORIGINAL, "judge"}
    params, record = ready.read(ready.files("trousers")[RETRAIN])
    assert params["a"]["b"].dtype == jnp.float32
    np.testing.assert_allclose(params["a"]["b"], [1, 1e-3], rtol=1e-3)
    assert record == {"right": len(RETRAIN)}


def test_means_and_ranges_of_runs():
    def run(shift, *names):
        look = {"still": {"8": 0.5 + shift}, "right": 0.75, "distance": 2.0}
        records = {("look", name): look | {"losses": {"kept, train": 0.25 + shift}} for name in names}
        for kind in ("relearn", "search", "guide"):
            records |= {(kind, name): {"still": [0.0, 0.25 + shift]} for name in names}
        return records

    found = seeds.table([run(0, ORIGINAL, "SalUn"), run(0.25, ORIGINAL)])
    assert found["runs"].tolist() == ["2", "1"]
    assert found["still drawn"].tolist() == ["0.625 (0.500 to 0.750)", "0.500"]
    assert found["loss of the kept"].tolist() == ["+0.0% (+0.0% to +0.0%)", "+0.0%"]
    assert "near right" not in found.columns


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match='no SALUN; there are "EUPMU budget"'):
        __main__.Config(methods=("SALUN",))


def test_near_and_far_are_utilities_where_it_is_said_what_is_near():
    scale = TASK.scale._replace(methods=None)
    assert methods.NEAR_AND_FAR not in study.methods_of(TASK._replace(scale=scale))
    near = TASK._replace(scale=scale, concepts=(TASK.concepts[0]._replace(near=(3,)),))
    assert study.methods_of(near) == tuple(methods.METHODS)
    assert study.stacks_of(near) == []


def test_halved_pictures_are_means():
    pictures = pictures_of(1, 2)
    found = tasks.halved(pictures)
    np.testing.assert_allclose(found.x[:, 0, 0, 0], pictures.x.mean((1, 2, 3)), rtol=1e-5)
    assert found.labels is pictures.labels


def test_tiles_are_in_order():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    whole = report.tiled(images, 3)
    assert whole.shape == (6, 9, 1)
    assert whole[::3, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (whole[2::3] == 255).all()
    np.testing.assert_array_equal(measures.in_bytes(np.array([-1.0, 0.0, 1.0, 3.0])), [0, 128, 255, 255])


SMOKE = [sys.executable, "-m", "experiments.diffusion"]


@pytest.mark.slow
def test_smoke_run_and_resume_after_a_kill(tmp_path):
    """Killed as soon as there is a model, it goes on, and nothing is done twice."""
    process = subprocess.Popen([*SMOKE, "--smoke", "--runs-dir", str(tmp_path)])
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in tmp_path.glob("*/digits/records.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = tmp_path.iterdir()
    task = folder / "digits"
    first = (task / "records.jsonl").read_text().splitlines()[0]
    ended = subprocess.run([*SMOKE, "--resume", str(folder)], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    lines = (task / "records.jsonl").read_text().splitlines()
    assert lines[0] == first
    records = read_records(task / "records.jsonl")
    assert len(records) == len(lines)
    assert {key[1] for key in records if key[0] == "unlearn"} == set(TASK.scale.methods)
    assert {key[1] for key in records if key[0] == "look"} == {ORIGINAL, RETRAIN, *TASK.scale.methods}
    assert records["unlearn", methods.HEADLINE]["promise"]["holds"]
    assert len([key for key in records if key[0] == "stack"]) == 5
    for name in "tables.md", "report.html", "digits/runs.png", "digits/concept.png", "digits/kept.png":
        assert (folder / name).stat().st_size > 0
    assert len(list((task / "models").glob("*.safetensors"))) == 2 + 1 + len(TASK.scale.methods) + 2
