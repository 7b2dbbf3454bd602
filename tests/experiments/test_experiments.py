"""The studies' machinery: forget sets, training, the loop, tuning, records, reports, command lines."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments.classification import __main__ as classification
from experiments.classification import costs, plots, study, tables, tuning
from experiments.classification import report as study_report
from experiments.quickstart import __main__ as quickstart
from experiments.shared import command, report
from experiments.shared.configs import CONFIGS, Config, check
from experiments.shared.data import images
from experiments.shared.forget_sets import Task, make_task, memorisation, wrong_labels
from experiments.shared.labels import LabelledExamples, cross_entropy, label_losses
from experiments.shared.loop import (
    Told,
    make_plan,
    make_unlearn,
    make_unlearn_many,
    make_unlearner,
    number_of_steps,
)
from experiments.shared.models.classifier import MLP, MODELS, make_classifier
from experiments.shared.models.resnet import ResNet
from experiments.shared.peers import PEERS
from experiments.shared.records import of_kind, open_records, read_records
from experiments.shared.scores import full_scores
from experiments.shared.testbed import Outputs, make_testbed
from experiments.shared.training import Recipe, augment, augmented, batch_rows, make_trainer
from experiments.shared.unseen import like_retained, unseen_targets

RECIPE = Recipe(epochs=4, batch_size=32, optimizer="adam", learning_rate=3e-3)
TINY = dataclasses.replace(
    CONFIGS["smoke"],
    training=RECIPE,
    tasks=("class:3", "random:0.1"),
    train_size=300,
    validation_size=100,
    test_size=100,
    methods=("random labels", "EUPMU lagged", "EUPMU budget (unseen)"),
    trials=2,
    shadows=3,
    relearning_steps=10,
)


@pytest.fixture(scope="module")
def data():
    return images.partition(*images.digits(), train_size=300, validation_size=100, test_size=100, seed=0)


@pytest.fixture(scope="module")
def classifier():
    return make_classifier(MLP(10, (32,)))


@pytest.fixture(scope="module")
def trainer(classifier):
    return make_trainer(classifier, RECIPE)


def on_device(examples):
    """Examples with wrong labels, seed 0."""
    return LabelledExamples(*map(jnp.asarray, (*examples, wrong_labels(examples.y, 10, seed=0))))


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("spec", ["class:3", "subclass:3", "random:0.1", "random:0.5", "memorised:0.1"])
def test_forget_sets_are_disjoint_and_complete(spec, data, trainer, classifier):
    task = make_task(spec, data, trainer, classifier, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([task.forget, task.retain])), np.arange(300))
    labels = data.train.y[task.forget]
    if spec == "class:3":
        assert set(labels) == {3}
        assert 3 not in data.train.y[task.retain]
        assert 3 not in data.test.y[task.judged_on(data.test)]
    else:
        np.testing.assert_array_equal(task.judged_on(data.test), np.arange(100))
    if spec == "subclass:3":
        assert set(labels) == {3}
        assert 3 in data.train.y[task.retain]
    if spec.startswith(("random", "memorised")):
        assert len(task.forget) == round(float(spec.split(":")[1]) * 300)
    again = make_task(spec, data, trainer, classifier, seed=0)
    np.testing.assert_array_equal(again.forget, task.forget)


@pytest.mark.parametrize("spec", ["class:x", "class:77", "random:0", "random:1", "random:2", "odd:1", ""])
def test_impossible_forget_sets_are_named(spec, data, trainer, classifier):
    with pytest.raises(ValueError, match=f"task '{spec}'"):
        make_task(spec, data, trainer, classifier, seed=0)


def test_memorisation_finds_wrong_labels(data, classifier):
    """A label that contradicts its image can only be known by heart."""
    labels = data.train.y.copy()
    labels[:15] = (labels[:15] + 5) % 10
    thorough = make_trainer(classifier, dataclasses.replace(RECIPE, epochs=100, learning_rate=1e-2))
    scores = memorisation(images.Examples(data.train.x, labels), thorough, classifier, seed=0)
    assert np.all((scores >= -1) & (scores <= 1))
    worst = np.argsort(-scores)[:15]
    assert np.sum(worst < 15) >= 8, "chance finds less than one"


def predicted(labels, confidence):
    """Probabilities of two classes, of that confidence in the labels."""
    p = 1 / (1 + np.exp(-np.asarray(confidence, np.float64)))
    return np.where(np.arange(2) == labels[:, None], p[:, None], 1 - p[:, None])


@pytest.fixture(scope="module")
def two_classes():
    """400 examples to train on, 300 held out and none to test on."""
    rng = np.random.default_rng(0)
    sets = [images.Examples(rng.normal(size=(n, 2, 2, 1)), rng.integers(0, 2, n)) for n in (400, 300, 0)]
    return images.Data(*sets)


@pytest.mark.parametrize("excess", [0.0, 3.0])
def test_targets_take_off_what_the_original_is_more_certain_of_than_of_unseen_examples(excess, two_classes):
    """Original = reference + 2 on all, and `excess` more on what it was trained on."""
    train, held_out, _ = two_classes
    rng = np.random.default_rng(1)
    phi, phi_held_out = rng.normal(0, 3, 400), rng.normal(0, 3, 300)
    task = Task.of("random:0.1", np.arange(0, 400, 10), 400)
    reference = predicted(train.y, phi), predicted(held_out.y, phi_held_out)
    original = predicted(train.y, phi + 2 + excess), predicted(held_out.y, phi_held_out + 2)
    targets = unseen_targets(task, two_classes, original, reference)
    np.testing.assert_allclose(targets[task.forget], phi[task.forget] + 2, atol=1e-9)
    assert np.all(np.isnan(targets[task.retain])), "nothing else has a target"


def test_targets_keep_their_order_among_examples_that_are_alike(two_classes):
    """With a reference that tells nothing, the most certain forget example stays the most certain."""
    train, held_out, _ = two_classes
    rng = np.random.default_rng(1)
    task = Task.of("random:0.1", np.arange(0, 400, 10), 400)
    c, c_held_out = rng.normal(5, 1, 400), rng.normal(0, 2, 300)
    reference = predicted(train.y, np.zeros(400)), predicted(held_out.y, np.zeros(300))
    original = predicted(train.y, c), predicted(held_out.y, c_held_out)
    targets = unseen_targets(task, two_classes, original, reference)[task.forget]
    np.testing.assert_array_equal(np.argsort(targets), np.argsort(c[task.forget]))
    assert c_held_out.min() <= targets.min() < targets.max() <= c_held_out.max()


def test_the_targets_of_a_forgotten_class_are_the_references_confidence(two_classes):
    train, held_out, _ = two_classes
    task = Task.of("class:1", np.flatnonzero(train.y == 1), 400)
    phi = np.linspace(-9, 1, 400)
    reference = predicted(train.y, phi), predicted(held_out.y, np.zeros(300))
    original = predicted(train.y, np.full(400, 8.0)), predicted(held_out.y, np.full(300, 4.0))
    targets = unseen_targets(task, two_classes, original, reference)[task.forget]
    np.testing.assert_allclose(targets, phi[task.forget], atol=1e-9)


def test_held_out_examples_like_the_forget_set_are_left_out():
    """A held-out image counts by the nearest training image of its own label, if there is one."""
    at = lambda values, labels: images.Examples(np.reshape(values, (-1, 1, 1, 1)), np.array(labels))
    train = at([0, 10, 100, 5], [0, 0, 0, 1])
    task = Task.of("subclass:0", np.array([1]), 4)
    held_out = at([4, 6, 54, 56, 10, 0], [0, 0, 0, 0, 1, 2])
    np.testing.assert_array_equal(like_retained(task, train, held_out), [0, 3, 4])


def test_wrong_labels_are_wrong_and_within_range():
    labels = np.arange(1000) % 7
    wrong = wrong_labels(labels, 7, seed=0)
    assert np.all(wrong != labels)
    assert set(wrong) == set(range(7))


def test_batches_pass_over_everything_equally():
    rows = batch_rows(np.arange(10) + 5, batch_size=4, steps=5, seed=0)
    assert rows.shape == (5, 4)
    np.testing.assert_array_equal(np.bincount(rows.ravel(), minlength=15), [0] * 5 + [2] * 10)
    assert batch_rows(np.arange(3), 8, 2, seed=0).shape == (2, 8)


def test_a_plan_pairs_forget_with_retain():
    forget, retain = np.arange(5), np.arange(5, 50)
    plan = make_plan(forget, retain, steps=20, batch_size=4, seed=0)
    assert plan.rows.forget.shape == plan.rows.retain.shape == (20, 4)
    assert set(plan.rows.forget.ravel()) == set(forget)
    assert set(plan.rows.retain.ravel()) == set(retain)
    assert set(plan.forget_set.ravel()) == set(forget)
    assert number_of_steps(5, 6000, 64) == 470
    assert number_of_steps(1, 3, 64) == 10


def test_augmented_images_are_shifted_and_mirrored():
    image = np.arange(1, 37, dtype=np.uint8).reshape(6, 6, 1)
    out = np.asarray(augment(jax.random.key(0), jnp.tile(image, (200, 1, 1, 1))))
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = [padded[i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
    possible = {window.tobytes() for window in windows} | {w[:, ::-1].tobytes() for w in windows}
    seen = {one.tobytes() for one in out}
    assert seen <= possible
    assert len(seen) > 50


def test_the_small_resnet_is_the_same_with_convolutions_as_matmuls():
    x = jax.random.uniform(jax.random.key(1), (4, 28, 28, 1))
    as_matmuls = MODELS["resnet8"](10)
    params = as_matmuls.init(jax.random.key(0), x, train=True)
    by_convolution = dataclasses.replace(as_matmuls, as_matmuls=False)
    assert jax.tree.map(jnp.shape, by_convolution.init(jax.random.key(0), x, train=True)) == jax.tree.map(
        jnp.shape, params
    )
    of = lambda model: jax.jit(partial(model.apply, train=True))(params, x)
    np.testing.assert_allclose(of(as_matmuls), of(by_convolution), atol=1e-5)


@pytest.mark.slow
def test_prediction_normalises_by_the_calibration_images():
    """With one batch as its calibration, prediction on that batch is the training-mode forward pass."""
    classifier = make_classifier(ResNet(3, width=4))
    x = jax.random.randint(jax.random.key(1), (6, 8, 8, 3), 0, 256).astype(jnp.uint8)
    params = classifier.init(jax.random.key(0), x)
    assert "batch_stats" not in params
    expected = jax.nn.softmax(classifier.apply(params, x))
    got = jax.jit(classifier.predict)(params, x[None], x)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    other = jax.jit(classifier.predict)(params, (x // 4)[None], x)
    assert not np.allclose(other, expected, atol=1e-3)


def test_the_sgd_recipe_step_by_step(data):
    """Momentum, weight decay, and a rate that falls to a tenth at half of the run; no augmentation."""
    classifier = make_classifier(MLP(10, ()))
    recipe = Recipe(2, 150, "sgd", learning_rate=0.1, weight_decay=0.01, drops=(0.5,))
    trainer = make_trainer(classifier, recipe)
    plan = trainer.plan(np.arange(300), 0)
    assert plan.shape == (2, 2, 150)
    train = on_device(data.train)
    got, _ = trainer.train(train, plan, 0)
    params = classifier.init(jax.random.split(jax.random.key(0))[0], train.x[:1])
    velocity = jax.tree.map(jnp.zeros_like, params)
    for number, rows in enumerate(plan.reshape(-1, 150)):
        loss = lambda p, x=train.x[rows], y=train.y[rows]: cross_entropy(classifier.apply, p, x, y).mean()
        grads = jax.grad(loss)(params)
        velocity = jax.tree.map(lambda v, g, p: 0.9 * v + g + 0.01 * p, velocity, grads, params)
        rate = 0.1 if number < 2 else 0.01
        params = jax.tree.map(lambda p, v, rate=rate: p - rate * v, params, velocity)
    assert_trees_close(got, params, atol=1e-6)


@pytest.mark.slow
def test_augmentation_reaches_training_and_unlearning(data, classifier):
    train, rows = on_device(data.train), np.arange(300)
    trained = []
    for is_augmented in (False, True):
        trainer = make_trainer(classifier, dataclasses.replace(RECIPE, augmented=is_augmented))
        trained.append(trainer.train(train, trainer.plan(rows, 0), 0)[0])
    assert not np.allclose(*(jax.tree.leaves(params)[0] for params in trained), atol=1e-3)
    plan = make_plan(np.arange(30), np.arange(30, 300), steps=10, batch_size=16, seed=0)
    knobs, losses = {"learning_rate": 0.01}, label_losses(classifier.apply)
    ends = []
    for augmentation in (None, augmented):
        unlearn = make_unlearn(make_unlearner(PEERS["PCGrad"].make, losses, augmented=augmentation))
        ends.append(unlearn(knobs, train, trained[0], plan, 0).params)
    assert not np.allclose(*(jax.tree.leaves(params)[0] for params in ends), atol=1e-4)


def test_full_size_recipe_is_the_published_one():
    config = CONFIGS["cifar10"]
    params = jax.eval_shape(
        make_classifier(MODELS["resnet18"](10)).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8)
    )
    # ResNet-18 for CIFAR-10 has 11,173,962 weights.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_173_962
    assert config.training == Recipe(182, 256, "sgd", 0.1, 5e-4, (0.5, 0.75), augmented=True)
    assert (config.validation_size, config.unlearning_epochs, config.weight_decay) == (5000, 5, 5e-4)


def test_many_models_in_one_call_are_the_same_models(data, classifier, trainer):
    train = on_device(data.train)
    rows = np.arange(300)
    plans = np.stack([trainer.plan(rows, seed) for seed in (0, 1)])
    many = trainer.train_many(train, plans, jnp.stack([jax.random.key(seed) for seed in (0, 1)]))
    singles = [trainer.train(train, plans[seed], seed)[0] for seed in (0, 1)]
    accuracy = np.mean(classifier.apply(singles[0], train.x).argmax(-1) == train.y)
    assert accuracy > 0.5
    for seed, single in enumerate(singles):
        assert_trees_close(jax.tree.map(lambda leaf, s=seed: leaf[s], many), single, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["SalUn", "SCRUB", "EUPMU lookahead", "EUPMU budget (unseen)", "TorchJD PCD"]
)
def test_unlearning_many_at_once_is_unlearning_each(method, data, classifier, trainer):
    """Each from its own start, in its own batches, told its own baseline and targets."""
    if PEERS[method].package is not None:
        pytest.importorskip(PEERS[method].package)
    train = on_device(data.train)
    params, _ = trainer.train(train, trainer.plan(np.arange(300), 0), 0)
    peer = PEERS[method]
    knobs = {"learning_rate": 0.003, **{name: float(np.mean(r)) for name, r in peer.knobs.items()}}
    losses = label_losses(classifier.apply, peer.forget_loss)
    unlearner = make_unlearner(peer.make, losses, weight_decay=1e-3)
    told = [
        Told({"baseline": 0.2 * i} if peer.is_told_baseline else {}, {"unseen": jnp.full(300, -2.0 * i)})
        for i in (1, 2)
    ]
    plans = [make_plan(np.arange(30), np.arange(30, 300), steps=20, batch_size=16, seed=s) for s in (0, 1)]
    unlearn = make_unlearn(unlearner)
    parts = []
    singles = [
        unlearn(*of_model.to(knobs, train), params, plan, 0, parts.append)
        for of_model, plan in zip(told, plans, strict=True)
    ]
    assert sum(parts) == pytest.approx(2)
    assert singles[0].history["retain_loss"].shape == (20,)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    stack = lambda *each: jax.tree.map(lambda *parts: np.stack(parts), *each)
    keys = jax.random.split(jax.random.key(0), 2)
    many = make_unlearn_many(unlearner)(knobs, both, keys, train, stack(*told), stack(*plans))
    for i, single in enumerate(singles):
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], many), single.params, atol=1e-5)
    assert not np.allclose(
        jax.tree.leaves(singles[0].params)[-1], jax.tree.leaves(singles[1].params)[-1], atol=1e-5
    )


@pytest.mark.parametrize("name", list(PEERS))
def test_settings_to_try_fill_their_ranges(name):
    peer = PEERS[name]
    settings = tuning.settings_to_try(peer, 12, seed=3)
    assert settings == tuning.settings_to_try(peer, 12, seed=3)
    assert len({tuple(one.values()) for one in settings}) == 12
    for knob, (low, high) in {"learning_rate": peer.learning_rate, **peer.knobs}.items():
        values = np.array([one[knob] for one in settings])
        assert np.all((values >= low * 0.999) & (values <= high * 1.001))
        assert np.sum(values < np.sqrt(low * high)) in (5, 6, 7), "log-uniform"


def test_a_softmax_that_is_zero_in_float32_leaves_the_divergence_finite(data):
    certain = [np.eye(10, dtype=np.float32)[(part.y + 1) % 10] for part in data]
    right = [np.eye(10, dtype=np.float32)[part.y] for part in data]
    task = Task.of("random:0.1", np.arange(30), 300)
    scores = full_scores(SimpleNamespace(data=data), task, Outputs(*certain), Outputs(*right), ["confidence"])
    expected = -np.log(np.finfo(np.float32).tiny)
    np.testing.assert_allclose([scores[f"KL {name}"] for name in ("forget", "retain", "test")], expected)


def test_blind_score_by_hand():
    original = {"UA": 1.0, "RA": 99.0, "VA": 90.0, "TA": 0.0}
    scores = {"UA": 14.0, "RA": 97.0, "VA": 89.0, "TA": 0.0}
    assert tuning.blind_score(scores, original, whole_class=False) == 2 + 1 + abs(86 - 90)
    forgotten = {"UA": 100.0, "RA": 90.0, "VA": 80.0, "TA": 0.0}
    better = forgotten | {"RA": 95.0}
    nearly = better | {"UA": 99.0, "RA": 100.0}
    hardly = nearly | {"UA": 10.0}
    ranked = [
        tuning.blind_score(one, original, whole_class=True) for one in (better, forgotten, nearly, hardly)
    ]
    assert ranked == sorted(ranked)
    assert len(set(ranked)) == 4
    assert tuning.blind_score(scores | {"RA": float("nan")}, original, whole_class=False) == float("inf")
    unseen = scores | {"TA": 50.0}
    assert tuning.blind_score(unseen, original, whole_class=False) == 7, "the test set is not looked at"


def test_records_survive_being_killed(tmp_path):
    path = tmp_path / "records.jsonl"
    with open_records(path) as records:
        assert records.get(("run", "a"), lambda: {"x": 1.5})["x"] == 1.5
        records.get(("run", "b"), lambda: {"x": float("nan")})
    path.write_text(path.read_text() + '{"key": ["run", "c"], "x"')
    assert [record["key"][1] for record in of_kind(read_records(path), "run")] == ["a", "b"]
    with open_records(path) as records:
        assert records.get(("run", "a"), pytest.fail) == {"key": ["run", "a"], "x": 1.5}
        assert records.get(("run", "c"), lambda: {"x": 2})["x"] == 2
    assert len(path.read_text().splitlines()) == 3
    assert list(read_records(path)) == [("run", "a"), ("run", "b"), ("run", "c")]


def test_two_processes_cannot_write_one_study(tmp_path):
    path = tmp_path / "records.jsonl"
    with (
        open_records(path),
        pytest.raises(ValueError, match="another process"),
        open_records(path),
    ):
        pass
    with open_records(path):
        pass


def test_damaged_records_are_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"key": ["run", "a"]}\nnonsense\n')
    with pytest.raises(ValueError, match=r"records\.jsonl: line 2 is damaged"):
        read_records(path)


def test_front_and_hypervolume_by_hand():
    points = np.array([[10.0, 90.0], [50.0, 60.0], [40.0, 50.0], [90.0, 20.0], [50.0, 10.0]])
    np.testing.assert_array_equal(plots.front(points), [[90, 20], [50, 60], [10, 90]])
    assert plots.hypervolume(points, 100) == pytest.approx((90 * 20 + 50 * 40 + 10 * 30) / 1e4)
    assert plots.hypervolume(points, 60) == pytest.approx((60 * 20 + 50 * 40 + 10 * 30) / 6e3)
    assert plots.hypervolume(np.array([[np.nan, 1.0]]), 100) == 0
    assert plots.hypervolume(points, 0) == 0
    rng = np.random.default_rng(0)
    points, samples = rng.uniform(0, 100, (20, 2)), rng.uniform(0, 100, (100_000, 2)) * [0.7, 1]
    dominated = np.any(np.all(samples[:, None] <= points[None], -1), -1).mean()
    assert plots.hypervolume(points, 70) == pytest.approx(dominated, abs=0.01)


def test_mean_and_std_over_seeds():
    """Unlearning seeds are averaged within their training seed; a diverged run leaves no mean."""
    frame = pd.DataFrame(
        {
            "method": ["b", "b", "b", "a", "a", "c"],
            "training_seed": [0, 0, 1, 0, 1, 0],
            "x": [1.0, 3.0, 4.0, 5.0, np.nan, 7.0],
        }
    )
    table = report.mean_and_std(frame, {"x": 1})
    assert list(table.index) == ["b", "a", "c"]
    assert list(table["x"]) == ["3.0 ± 1.4", "-", "7.0"]


@pytest.mark.parametrize(
    ("retrain_error", "test_accuracy", "warns"), [(4, 96, True), (4, 90, False), (100, 96, False)]
)
def test_a_table_says_where_even_retraining_hardly_forgets(retrain_error, test_accuracy, warns):
    frame = pd.DataFrame({"method": ["Original", "Retrain"], "UA": [0.0, retrain_error]})
    frame = frame.assign(RA=99.0, TA=float(test_accuracy))
    assert ["hardly forgets" in text for text in tables.caveats(frame)] == [True] * warns


def test_run_folders_never_collide(tmp_path):
    assert len({report.new_run_dir(tmp_path, "x") for _ in range(5)}) == 5


def test_what_is_not_finite_is_null_in_json():
    assert report.plain({"a": [float("nan"), 1.0], "b": (pathlib.Path("x"),)}) == {
        "a": [None, 1.0],
        "b": ["x"],
    }


# The tests that use it share one worker, so that it is made once.
of_one_study = pytest.mark.xdist_group("study")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole tiny study, and its folder."""
    path = report.start_run(tmp_path_factory.mktemp("runs"), "classification", TINY, "tiny")
    parts = []
    made = make_testbed(TINY)
    study.run(made, path, lambda what, part: parts.append(part))
    return made, path, sum(parts)


@of_one_study
def test_a_study_reports_everything_it_should(finished):
    made, path, work = finished
    assert work == pytest.approx(study.amount_of_work(TINY))
    study_report.write_report("Tiny", path, made)
    runs = report.read_csv(path / "runs.csv")
    references = {"Original", "Retrain", report.OTHER_SEED}
    tuning = runs["training_seed"] == TINY.tuning_seed
    assert set(runs[tuning]["method"]) == references, "the tuning model is not reported"
    runs = runs[~tuning]
    names = {*TINY.methods, *references, "constant at EUPMU lagged"}
    assert set(runs["method"]) == names
    assert len(runs) == 2 * len(names)
    assert np.all(runs.loc[runs["method"] == report.OTHER_SEED, "gap"] > 0)
    assert np.all(runs.loc[runs["method"].isin(TINY.methods), "knob learning_rate"] > 0)
    of_retrain = runs[runs["method"] == "Retrain"]
    assert np.all(of_retrain["gap"] == 0)
    assert np.all(of_retrain["ToW"] == 1)
    np.testing.assert_allclose(of_retrain[["KL forget", "KL retain", "KL test"]], 0, atol=1e-12)
    for name in ("UA", "RA", "TA", "MIA", "MIA entropy", "worst class"):
        assert np.all(runs[name].between(0, 100)), name
    trials = report.read_csv(path / "trials.csv")
    assert np.all(trials.groupby(["task", "method"]).size() == TINY.trials)
    chosen = trials[trials["chosen"]]
    assert len(chosen) == 2 * len(TINY.methods)
    assert np.all(chosen["score"].to_numpy() == trials.groupby(["task", "method"], sort=False)["score"].min())
    origin = json.loads((path / "runs.csv").read_text().splitlines()[0].removeprefix("# "))
    assert origin["config"]["training"]["epochs"] == RECIPE.epochs
    assert {"name", "sessions", "steps", "sizes"} <= origin.keys()
    assert {"versions", "device", "commit", "date"} <= origin["sessions"][0].keys()
    results = json.loads((path / "results.json").read_text())
    assert len(results["runs"]) == len(runs) + tuning.sum()
    page = (path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "http" not in re.sub('"data:image/png;base64,[^"]*"', "", page), "it is read offline"
    assert "Targets of the unseen confidence" in page
    for text in (page, (path / "tables.md").read_text()):
        for word in ("U-LiRA", "Relearning", "Hypervolume", "fixed point", "gradients per step", "versions"):
            assert word in text


@of_one_study
def test_the_likelihood_ratio_attack_knows_original_from_retrain(finished):
    _, path, _ = finished
    records = of_kind(read_records(path / "records.jsonl"), "likelihood ratio")
    names = ["Original", "Retrain", *TINY.methods]
    assert [tuple(record["key"][1:]) for record in records] == [(t, n) for t in TINY.tasks for n in names]
    found = {record["key"][2]: record for record in records if record["key"][1] == "random:0.1"}
    figures = {name: (record["auc"], record["accuracy"]) for name, record in found.items()}
    assert len(set(figures.values())) == len(figures), "every ensemble is its own"
    assert found["Original"]["auc"] > found["Retrain"]["auc"]
    assert abs(found["Retrain"]["auc"] - 0.5) < 0.25  # three shadows, 30 examples


@of_one_study
def test_gradient_evaluations(finished):
    made, _, _ = finished
    gradients = lambda method: costs.step_cost(made, method)["gradients"]
    assert gradients("fine-tuning") == pytest.approx(0.5, abs=0.05)
    assert gradients("random labels") == pytest.approx(1, abs=0.05)
    assert 1.1 < gradients("EUPMU lookahead") < 1.4
    assert gradients("FAMO") > gradients("EUPMU lookahead")


@of_one_study
@pytest.mark.slow
def test_an_interrupted_study_ends_like_an_uninterrupted_one(finished, tmp_path):
    made, whole, _ = finished
    folder = report.start_run(tmp_path, "classification", TINY, "tiny")

    def stop_in_the_middle(what, part):
        if what.startswith("random:0.1: EUPMU budget"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(made, folder, stop_in_the_middle)
    path = folder / "records.jsonl"
    half = path.read_text()
    assert 0 < len(half.splitlines()) < len((whole / "records.jsonl").read_text().splitlines())
    path.write_text(half + '{"key": ["ru')
    study.run(make_testbed(TINY), folder, lambda what, part: None)
    (first,) = report.read_origin(folder)["sessions"]
    report.write_origin(folder, report.read_origin(folder) | {"sessions": [first | {"commit": "other"}]})
    report.note_session(folder)
    assert len(report.read_origin(folder)["sessions"]) == 2, "other code was noted"
    resumed, expected = (read_records(run / "records.jsonl") for run in (folder, whole))
    assert resumed.keys() == expected.keys()
    for key, record in expected.items():
        if key[0] != "cost":
            numbers = [name for name, value in record.items() if isinstance(value, float)]
            names = [name for name in numbers if name != "seconds"]
            assert_trees_close([resumed[key][n] for n in names], [record[n] for n in names], rtol=1e-6)
    assert path.read_text().startswith(half), "nothing was done twice"


def test_configs_survive_json():
    for config in CONFIGS.values():
        values = json.loads(json.dumps(report.plain(dataclasses.asdict(config))))
        assert command.restored(Config, values) == config


def parsed(arguments):
    return command.parse(arguments, "python -m experiments.classification", Config, CONFIGS)


def test_command_line(tmp_path):
    runs = ["--runs-dir", str(tmp_path)]
    given = ["--smoke", "--trials", "3", "--training.epochs", "5", *runs]
    config, path = parsed(given)
    assert (config.trials, config.training.epochs, path) == (3, 5, None)
    assert config.unlearning_epochs == CONFIGS["smoke"].unlearning_epochs
    assert parsed(runs).config == dataclasses.replace(CONFIGS["digits"], runs_dir=tmp_path)
    path = report.start_run(tmp_path, "classification", config, "smoke")
    assert parsed(["--resume", str(path)]) == (config, path)
    chosen = parsed(["--config", "cifar100", *runs]).config
    assert chosen == dataclasses.replace(CONFIGS["cifar100"], runs_dir=tmp_path)
    for option in (["--trials", "3"], ["--config", "digits"]):
        with pytest.raises(ValueError, match="leave the other options out"):
            parsed(["--resume", str(path), *option])
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        parsed(["--resume", str(tmp_path)])
    (path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not the description of a run"):
        parsed(["--resume", str(path)])
    other = report.start_run(tmp_path, "knobs", config)
    with pytest.raises(ValueError, match="a run of knobs, not of classification"):
        parsed(["--resume", str(other)])
    report.write_origin(path, {"name": "classification", "config": {"trials": 3}, "sessions": []})
    with pytest.raises(ValueError, match="other code, whose settings differ: batch_size"):
        parsed(["--resume", str(path)])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"trials": 0}, "trials"),
        ({"batch_size": 1}, "batch_size"),
        ({"unlearning_epochs": 0}, "unlearning_epochs"),
        ({"shadows": 2}, "shadows"),
        ({"relearning_steps": 25}, "relearning_steps"),
        ({"relearning_examples": 0}, "relearning_examples"),
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("class:1", "class:1")}, "tasks"),
        ({"methods": ()}, "methods"),
        ({"methods": ("magic",)}, "methods: unknown"),
        ({"training_seeds": ()}, "training_seeds"),
        ({"tuning_seed": 0}, "tuning_seed"),
    ],
)
def test_settings_that_cannot_work_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        check(dataclasses.replace(TINY, **change), PEERS)


def test_a_method_of_a_package_that_is_not_here_says_how_to_get_it():
    peers = {"TorchJD PCD": PEERS["TorchJD PCD"]._replace(package="no_such_package")}
    with pytest.raises(ValueError, match=r"TorchJD PCD needs no_such_package: pip install .*benchmarks"):
        check(dataclasses.replace(TINY, methods=("TorchJD PCD",)), peers)


@of_one_study
def test_trials_of_other_settings_are_not_reused(finished, tmp_path):
    made, whole, _ = finished
    folder = report.start_run(tmp_path, "classification", TINY, "tiny")
    text = (whole / "records.jsonl").read_text()
    changed = text.replace('"knobs": {"learning_rate": ', '"knobs": {"learning_rate": 1')
    (folder / "records.jsonl").write_text(changed)
    with pytest.raises(ValueError, match="made by other code"):
        study.run(made, folder, lambda what, part: None)


@pytest.mark.slow
def test_help_teaches():
    command = [sys.executable, "-m", "experiments.classification", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    for word in ("--resume", "fashion-mnist", "cifar10", "--smoke", "memorised:SHARE", "--trials"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "cifar10"], "--data-dir"),
        (["--smoke", "--tasks", "class:99"], "class:99"),
        (["--smoke", "--train-size", "100000"], "train_size"),
    ],
)
def test_a_command_that_cannot_work_says_so(arguments, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        classification.main(*parsed([*arguments, "--runs-dir", str(tmp_path), "--training.epochs", "1"]))
    assert arguments[0] == "--smoke" or not list(tmp_path.iterdir()), "no folder for nothing"


def test_quickstart(tmp_path, capsys):
    """It says what was promised and what was spent, and the figures in its folder bear it out."""
    config = quickstart.Config(runs_dir=tmp_path)
    quickstart.main(config)
    (path,) = tmp_path.iterdir()
    printed = capsys.readouterr().out
    assert str(path / "report.html") in printed
    found = json.loads((path / "evaluation.json").read_text())
    before, after = found["before"], found["after"]
    rise = after["retain"]["cross_entropy"] - before["retain"]["cross_entropy"]
    assert rise <= config.budget
    assert f"rose by {rise:.3f}" in printed
    assert "you allowed" in printed
    assert before["forget"]["accuracy"] > 0.9
    assert after["forget"]["accuracy"] < 0.1
    assert found["trained without it"]["forget"]["accuracy"] == 0
    for file in ("report.html", "curves.png"):
        assert (path / file).stat().st_size > 1000


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """In one line, with the folder; before there is one it can only be started again."""
    path = tmp_path / "study-1"

    def main(config, resume=None):
        with command.working_in(path):
            raise KeyboardInterrupt

    def early(config, resume=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["study"])
    monkeypatch.setattr(command.os, "_exit", sys.exit)
    for function, said in ((main, f"--resume {path}"), (early, "start again")):
        with pytest.raises(SystemExit) as ended:
            command.run(function, Config, CONFIGS)
        assert ended.value.code == 130
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("Interrupted: ")
        assert line.endswith(said)
