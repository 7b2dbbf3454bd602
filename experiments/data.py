"""Data sets as arrays, and their split into what to forget and what to retain."""

import gzip
import math
import pathlib
import zlib
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FASHION_MNIST_DIR = pathlib.Path("/usr/share/datasets/fashion-mnist")


class Examples(NamedTuple):
    """Inputs, float32 in [0, 1], [n, features], and labels, int32 [n]."""

    x: Any
    y: Any

    def __getitem__(self, rows):  # type: ignore[override]
        return Examples(self.x[rows], self.y[rows])

    @property
    def size(self) -> int:
        return len(self.y)


class Split(NamedTuple):
    """What a method may see (forget, retain), and the test set it is judged on."""

    forget: Examples
    retain: Examples
    test: Examples


def digits(seed: int) -> tuple[Examples, Examples]:
    """scikit-learn's 8x8 digits: 1,437 training and 360 test images of 10 classes."""
    x, y = (np.asarray(part) for part in load_digits(return_X_y=True))
    data = Examples((x / 16).astype(np.float32), y.astype(np.int32))
    train, test = train_test_split(np.arange(len(y)), test_size=360, random_state=seed, stratify=y)
    return data[train], data[test]


def fashion_mnist(seed: int, directory: pathlib.Path, train_size: int, test_size: int):
    """A random part of Fashion-MNIST's IDX files: small enough to overfit, so members stand out."""

    def part(prefix, size):
        x = read_idx(directory / f"{prefix}-images-idx3-ubyte")
        y = read_idx(directory / f"{prefix}-labels-idx1-ubyte")
        if x.ndim != 3 or y.shape != (len(x),):
            raise ValueError(f"{prefix}: images {x.shape} and labels {y.shape} do not belong together")
        rows = np.random.default_rng(seed).permutation(len(x))[:size]
        return Examples((x[rows] / 255).reshape(len(rows), -1).astype(np.float32), y[rows].astype(np.int32))

    return part("train", train_size), part("t10k", test_size)


def read_idx(path: pathlib.Path) -> np.ndarray:
    """An array of unsigned bytes from an IDX file, gzipped (.gz) or not; ValueError if it is damaged."""
    zipped = path.with_name(path.name + ".gz")
    if not path.exists() and not zipped.exists():
        raise FileNotFoundError(
            f"neither {path} nor {zipped.name} is there. Fashion-MNIST comes with Debian and Ubuntu: "
            "apt-get install dataset-fashion-mnist, or give the folder of its IDX files with --data-dir"
        )
    try:
        raw = path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{zipped} is damaged: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    header = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[start : start + 4], "big") for start in range(4, header, 4))
    if len(raw) != header + math.prod(shape):
        raise ValueError(f"{path} is damaged: {len(raw) - header} bytes of data for shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def forget_class(train: Examples, test: Examples, label: int) -> Split:
    """Forget every example of one class; it is left out of the test set too."""
    forgotten = train.y == label
    return Split(train[forgotten], train[~forgotten], test[test.y != label])


def forget_random(train: Examples, test: Examples, fraction: float, seed: int) -> Split:
    """Forget a random part of the training examples."""
    order = np.random.default_rng(seed).permutation(train.size)
    count = round(fraction * train.size)
    return Split(train[order[:count]], train[order[count:]], test)


def wrong_labels(labels: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """For each label another one, uniformly: what the forget set is to be taken for."""
    shift = np.random.default_rng(seed).integers(1, classes, size=len(labels))
    return ((labels + shift) % classes).astype(np.int32)


def batch_rows(size: int, batch_size: int, steps: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """Row numbers [steps, batch_size]: reshuffled passes over `size` examples, one after another."""
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch_size // size)
    order = np.concatenate([rng.permutation(size) for _ in range(passes)])
    return order[: steps * batch_size].reshape(steps, batch_size)
