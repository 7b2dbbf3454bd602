"""Data loaders on files in the real format, and the quickstart from end to end."""

import csv
import dataclasses
import gzip
import json

import numpy as np
import pytest

from experiments import data, report
from experiments.quickstart import __main__ as quickstart


def idx(array):
    """An array of bytes in the IDX format."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion_dir(tmp_path):
    """A folder like Fashion-MNIST's: bright classes, one file unzipped."""
    rng = np.random.default_rng(0)
    for prefix, size in (("train", 400), ("t10k", 120)):
        labels = np.arange(size) % 10
        images = (20 * labels[:, None, None] + rng.integers(0, 50, (size, 28, 28))).astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_idx_files(fashion_dir):
    train, test = data.fashion_mnist(0, fashion_dir, train_size=300, test_size=1000)
    assert train.x.shape == (300, 784)
    assert test.size == 120
    assert train.x.dtype == np.float32
    assert 0 <= train.x.min() <= train.x.max() <= 1
    assert set(test.y) == set(range(10))
    bright = np.array([train.x[train.y == label].mean() for label in range(10)])
    assert np.all(np.diff(bright) > 0), "images and labels stay together"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"PK\3\4",
        b"\0\0\x0d\1\0\0\0\2ab",
        b"\0\0\x08\3\0\0",
        b"\0\0\x08\1\0\0\0\5ab",
        b"\0\0\x08\1\0\0\0\1ab",
    ],
)
def test_damaged_idx_files(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ValueError, match=r"damaged|not an IDX file"):
        data.read_idx(tmp_path / "x")


def test_damaged_gzip_and_missing_files(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx(np.arange(100)))[:-20])
    with pytest.raises(ValueError, match="damaged"):
        data.read_idx(tmp_path / "x")
    (tmp_path / "y.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="damaged"):
        data.read_idx(tmp_path / "y")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        data.read_idx(tmp_path / "z")


def test_images_and_labels_that_do_not_belong_together(fashion_dir):
    (fashion_dir / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(7)))
    with pytest.raises(ValueError, match="do not belong together"):
        data.fashion_mnist(0, fashion_dir, 10, 10)


def test_splits_are_disjoint_and_complete():
    train, test = data.digits(0)
    by_class = data.forget_class(train, test, 3)
    assert set(by_class.forget.y) == {3}
    assert 3 not in by_class.retain.y
    assert 3 not in by_class.test.y
    by_chance = data.forget_random(train, test, 0.1, seed=0)
    assert by_chance.forget.size == round(0.1 * train.size)
    for split in (by_class, by_chance):
        rows = np.concatenate([split.forget.x, split.retain.x])
        np.testing.assert_array_equal(np.sort(rows.sum(1)), np.sort(train.x.sum(1)))


def test_wrong_labels_are_wrong_and_within_range():
    labels = np.arange(1000) % 7
    wrong = data.wrong_labels(labels, 7, seed=0)
    assert np.all(wrong != labels)
    assert set(wrong) == set(range(7))


def test_batches_pass_over_everything_equally():
    rows = data.batch_rows(size=10, batch_size=4, steps=5, seed=0)
    assert rows.shape == (5, 4)
    np.testing.assert_array_equal(np.bincount(rows.ravel()), 2)
    assert data.batch_rows(3, 8, 2, seed=0).shape == (2, 8)


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.provenance(quickstart.Config())["commit"] == "unknown"


def test_run_folders_never_collide(tmp_path):
    assert len({report.new_run_dir(tmp_path, "x") for _ in range(5)}) == 5


@pytest.fixture
def short_settings(monkeypatch):
    short = {
        name: dataclasses.replace(setting, epochs=3, unlearning_epochs=1)
        for name, setting in quickstart.SETTINGS.items()
    }
    monkeypatch.setattr(quickstart, "SETTINGS", short)


@pytest.mark.usefixtures("short_settings")
@pytest.mark.parametrize("dataset", ["digits", "fashion-mnist"])
def test_quickstart(dataset, tmp_path, fashion_dir, capsys):
    runs = tmp_path / "runs"
    quickstart.main(quickstart.Config(dataset=dataset, data_dir=fashion_dir, runs_dir=runs))
    (path,) = runs.iterdir()
    printed = capsys.readouterr().out
    assert path.name in printed.replace("\n", "")
    assert ("hardly forgets" in printed.replace("\n", " ")) == (dataset == "digits")
    results = json.loads((path / "results.json").read_text())
    assert results["config"]["seed"] == 0
    assert {"versions", "device", "commit", "date", "seconds"} <= results.keys()
    assert len(results["tasks"]) == 2
    for task in results["tasks"].values():
        assert list(task["methods"])[:2] == ["Original", "Retrain"]
        assert len(task["methods"]) == 8
        assert task["methods"]["Retrain"]["gap"] == 0
        for row in task["methods"].values():
            assert all(0 <= row[name] <= 100 for name in ("UA", "RA", "TA", "MIA"))
    rows = list(csv.DictReader((path / "results.csv").read_text().splitlines()))
    assert len(rows) == 16
    for picture in ("histories.png", "trade_off.png"):
        assert (path / picture).read_bytes()[:4] == b"\x89PNG"


def test_what_is_not_finite_is_written_as_such(tmp_path):
    names = ("UA", "RA", "TA", "MIA", "gap", "seconds", "forget_loss", "retain_loss")
    row = dict.fromkeys(names, float("nan"))
    report.write_results(tmp_path, {"tasks": {"task": {"methods": {"method": row}}}})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["tasks"]["task"]["methods"]["method"]["UA"] is None
    assert "nan" in (tmp_path / "results.csv").read_text()
