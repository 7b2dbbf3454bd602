"""Image data sets: loaders on small files in the real formats, hostile and damaged ones, the partition."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import scipy.io
from PIL import Image
from sklearn.datasets import load_digits

from experiments.shared.data import images
from experiments.shared.data.images import Examples


def random_images(n, *shape, seed=0):
    """Images, uint8 [n, *shape], each value as likely as any other."""
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def pixel(shape, at):
    """An array that is 255 at one place and 0 elsewhere."""
    x = np.zeros(shape, np.uint8)
    x[at] = 255
    return x


def assert_examples(pool, x, y):
    assert pool.x.dtype == np.uint8
    assert pool.y.dtype == np.int32
    assert pool.x.flags.c_contiguous
    np.testing.assert_array_equal(pool.x, x)
    np.testing.assert_array_equal(pool.y, y)


# Digits


def test_digits():
    train, test = images.digits()
    assert train.x.shape == (1437, 8, 8, 1)
    assert test.x.shape == (360, 8, 8, 1)
    assert (train.x.dtype, train.y.dtype) == (np.uint8, np.int32)
    for pool in (train, test):
        share = np.bincount(pool.y) / pool.size
        np.testing.assert_allclose(share, 0.1, atol=0.005)
    # 16 levels 15.9375 apart, none lost, and every image still the one that scikit-learn has.
    levels = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert sorted(np.unique(train.x)) == levels
    raw, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    ours = {(level.tobytes(), label) for pool in (train, test) for level, label in zip(*pool, strict=True)}
    theirs = np.array(levels, np.uint8)[raw.astype(int)]
    assert ours == {(image.tobytes(), label) for image, label in zip(theirs, labels, strict=True)}


# Fashion-MNIST


def idx(array):
    """An array of bytes in the IDX format."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion_dir(tmp_path):
    """A folder like Fashion-MNIST's, some files unzipped; image i is white in row i, column 3."""
    for prefix, size in (("train", 12), ("t10k", 5)):
        x = np.stack([pixel((28, 28), (i, 3)) for i in range(size)])
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(size)))
    return tmp_path


def test_fashion_mnist(fashion_dir):
    for pool, size in zip(images.fashion_mnist(fashion_dir), (12, 5), strict=True):
        x = np.stack([pixel((28, 28, 1), (i, 3, 0)) for i in range(size)])
        assert_examples(pool, x, np.arange(size))


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
    (tmp_path / "some-file").write_bytes(raw)
    with pytest.raises(ValueError, match=r"some-file is (damaged|not an IDX file)"):
        images.read_idx(tmp_path / "some-file")


def test_damaged_gzip_and_missing_files(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx(np.arange(100)))[:-20])
    with pytest.raises(ValueError, match=r"x\.gz is damaged"):
        images.read_idx(tmp_path / "x")
    (tmp_path / "y.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"y\.gz is damaged"):
        images.read_idx(tmp_path / "y")
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist, .*--data-dir"):
        images.fashion_mnist(tmp_path)


def test_idx_files_that_do_not_fit(fashion_dir):
    labels, zipped = fashion_dir / "train-labels-idx1-ubyte", fashion_dir / "train-images-idx3-ubyte.gz"
    labels.write_bytes(idx(np.zeros(7)))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: .*\(7,\) do not belong together"):
        images.fashion_mnist(fashion_dir)
    labels.write_bytes(idx(np.zeros((12, 1))))
    with pytest.raises(ValueError, match="do not belong together"):
        images.fashion_mnist(fashion_dir)
    zipped.write_bytes(gzip.compress(idx(np.zeros((12, 20, 28)))))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: images \[n, 28, 28\]"):
        images.fashion_mnist(fashion_dir)
    zipped.write_bytes(gzip.compress(idx(np.zeros((0, 28, 28)))))
    labels.write_bytes(idx(np.zeros(0)))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte has no images"):
        images.fashion_mnist(fashion_dir)


# CIFAR


def python2_pickle(x, labels, label_key):
    """A batch byte for byte as Python 2 and its NumPy wrote CIFAR's."""
    short = lambda text: b"U" + bytes([len(text)]) + text
    integer = lambda number: b"J" + struct.pack("<i", number)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + short(b"b") + b"\x87R"
        b"(K\x01" + integer(len(x)) + integer(x.shape[1]) + b"\x86"
        b"cnumpy\ndtype\n" + short(b"u1") + b"K\0K\x01\x87R"
        b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        b"\x89T" + struct.pack("<i", x.size) + x.tobytes() + b"tb"
    )
    listed = b"](" + b"".join(integer(label) for label in labels) + b"e"
    return b"\x80\x02}(" + short(label_key) + listed + short(b"data") + array + b"u."


def write_batch(path, x, labels, label_key=b"labels", protocol=2):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({b"data": x, label_key: labels, b"batch_label": b"1 of 5"}, protocol))


def as_channel_first_rows(x):
    """Images [n, 32, 32, 3] as CIFAR's rows [n, 3072], by its own description of them."""
    return np.stack([np.concatenate([image[:, :, c].ravel() for c in range(3)]) for image in x])


def test_cifar10_from_python_2(tmp_path):
    x = random_images(12, 32, 32, 3)
    rows, labels = as_channel_first_rows(x), [0, 9, 3, 1]
    for i, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        (tmp_path / name).write_bytes(python2_pickle(rows[4 * i : 4 * i + 4], labels, b"labels"))
    train, test = images.cifar10(tmp_path)
    assert_examples(train, x[:8], labels * 2)
    assert_examples(test, x[8:], labels)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar10_from_python_3_in_its_parent_folder(tmp_path, protocol, order):
    x = random_images(6, 32, 32, 3)
    rows = np.asarray(as_channel_first_rows(x), order=order)
    folder = tmp_path / "cifar-10-batches-py"
    for i, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        write_batch(
            folder / name, np.asarray(rows[2 * i : 2 * i + 2], order=order), [i, 5], protocol=protocol
        )
    train, test = images.cifar10(tmp_path)
    assert_examples(train, x[:4], [0, 5, 1, 5])
    assert_examples(test, x[4:], [2, 5])
    assert images.cifar10(folder)[0].size == 4


@pytest.mark.parametrize(("y", "x", "c"), [(0, 1, 0), (1, 0, 0), (0, 0, 2), (31, 4, 1)])
def test_cifar_pixels_are_where_they_belong(tmp_path, y, x, c):
    rows = pixel((1, 3072), (0, 1024 * c + 32 * y + x))
    for name in ("data_batch_1", "test_batch"):
        write_batch(tmp_path / name, rows, [0])
    train, _ = images.cifar10(tmp_path)
    assert np.argwhere(train.x).tolist() == [[0, y, x, c]]


def test_cifar100_takes_its_fine_labels(tmp_path):
    x = random_images(100, 32, 32, 3)
    for folder in (tmp_path, tmp_path / "cifar-100-python"):
        folder.mkdir(exist_ok=True)
        fine = list(range(100)) if folder == tmp_path else list(range(99, -1, -1))
        for name in ("train", "test"):
            content = {b"data": as_channel_first_rows(x), b"fine_labels": fine, b"coarse_labels": [0] * 100}
            (folder / name).write_bytes(pickle.dumps(content, 2))
        train, test = images.cifar100(tmp_path)
        assert_examples(train, x, fine)
        assert_examples(test, x, fine)
        assert images.count_classes(train, test) == 100


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (np.zeros((3, 3072), np.uint8), [1, 2], "do not belong together"),
        (np.zeros((2, 3072), np.uint8), [1, -2], "from 0 within int32"),
        (np.zeros((2, 3072), np.uint8), [1, 2**31], "from 0 within int32"),
        (np.zeros((2, 3072), np.uint8), [1, 2**80], "from 0 within int32"),
        (np.zeros((2, 3072), np.uint8), [1, 2.5], "must be a list of integers"),
        (np.zeros((2, 3072), np.uint8), [[1], [2, 3]], "must be a list of integers"),
        (np.zeros((2, 3072), np.uint8), None, "must be a list of integers"),
        (np.zeros((2, 3071), np.uint8), [1, 2], r"\[n, 3072\]"),
        (np.zeros(3072, np.uint8), [1], r"\[n, 3072\]"),
        ([[0] * 3072], [1], r"\[n, 3072\]"),
        (np.zeros((2, 3072), np.float32), [1, 2], "must be uint8"),
        (np.zeros((2, 3072), np.int8), [1, 2], "must be uint8"),
        (np.zeros((2, 3072), object), [1, 2], "must be uint8"),
    ],
)
def test_cifar_batches_that_do_not_fit(tmp_path, x, labels, message):
    write_batch(tmp_path / "data_batch_1", x, labels)
    with pytest.raises(ValueError, match=rf"data_batch_1.*{message}"):
        images.cifar10(tmp_path)


def test_cifar_batch_without_images(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(python2_pickle(np.zeros((0, 3072), np.uint8), [], b"labels"))
    with pytest.raises(ValueError, match="data_batch_1 has no images"):
        images.cifar10(tmp_path)


def test_cifar_file_of_the_other_data_set(tmp_path):
    write_batch(tmp_path / "data_batch_1", np.zeros((1, 3072), np.uint8), [0], b"fine_labels")
    with pytest.raises(ValueError, match=r"data_batch_1: b'labels' .* is this a file of cifar10"):
        images.cifar10(tmp_path)


def test_missing_cifar_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1 is not there.*--data-dir.*test_batch"):
        images.cifar10(tmp_path)
    write_batch(tmp_path / "data_batch_1", np.zeros((1, 3072), np.uint8), [0])
    with pytest.raises(FileNotFoundError, match="test_batch is not there"):
        images.cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train is not there.*cifar-100-python"):
        images.cifar100(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 40, 120, -3000, -1])
def test_truncated_pickles(tmp_path, keep):
    path = tmp_path / "data_batch_1"
    path.write_bytes(python2_pickle(random_images(2, 3072), [0, 1], b"labels")[:keep])
    with pytest.raises(ValueError, match="data_batch_1 is damaged"):
        images.read_pickle(path)


@pytest.mark.parametrize("content", [b"<html>404</html>", pickle.dumps([1, 2]), pickle.dumps(None)])
def test_files_that_are_not_pickles_of_a_dict(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x is damaged"):
        images.read_pickle(tmp_path / "x")


# Hostile pickles


class Reduced:
    """Pickled as a call, which plain unpickling makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def string(text):
    """The opcode of a text, in protocol 4."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def called(module, name, *texts):
    """Protocol 4: the object at a (possibly dotted) name of a module, called with texts."""
    arguments = b"(" + b"".join(string(text) for text in texts) + b"t"
    return b"\x80\x04" + string(module) + string(name) + b"\x93" + arguments + b"R."


def attacks():
    """Pickles that, read by pickle.load, make a file called `marker` in the working directory."""
    code = "open('marker', 'w').close()"
    for protocol in (0, 2, 4):
        for function, text in ((os.system, "touch marker"), (eval, code), (exec, code)):
            attack = pickle.dumps({b"data": Reduced(function, text)}, protocol)
            yield f"{function.__name__}, protocol {protocol}", attack
    yield "within an array", pickle.dumps(np.array([Reduced(os.system, "touch marker")]), 2)
    yield "INST", b"(S'touch marker'\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nS'touch marker'\no."
    yield "a name of Python 2", b'\x80\x02c__builtin__\neval\n(S"' + code.encode() + b'"\ntR.'
    imported = b"cbuiltins\n__import__\n(S'os'\ntR"
    yield "getattr", b"cbuiltins\ngetattr\n(" + imported + b"S'system'\ntR(S'touch marker'\ntR."
    yield "a dotted name", called("codecs", "builtins.eval", code)


ATTACKS = dict(attacks())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_hostile_pickles_run_no_code(here, attack):
    pickle.loads(attack)
    assert (here / "marker").exists(), "the attack works on those who do not look"
    (here / "marker").unlink()
    (here / "data_batch_1").write_bytes(attack)
    with pytest.raises(ValueError, match=r"data_batch_1 is damaged.*has no place in a data set"):
        images.cifar10(here)
    assert not (here / "marker").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "ndarray.__init__"),
        ("numpy", "ndarray.__reduce__"),
        ("numpy", "dtype.__class__"),
        ("numpy", "matrix"),
        ("numpy", "load"),
        ("numpy", "lib._npyio_impl.os.system"),
        ("numpy", "core.multiarray._reconstruct"),
        ("numpy.core", "multiarray._reconstruct"),
        ("numpy.core.multiarray", "_reconstruct.__self__"),
        ("numpy.core.multiarray", "scalar"),
        ("_codecs", "encode.__self__"),
        ("_codecs", "decode"),
        ("builtins", "getattr"),
        ("copyreg", "_reconstructor"),
    ],
)
def test_names_are_admitted_exactly_or_not_at_all(tmp_path, module, name):
    (tmp_path / "x").write_bytes(called(module, name))
    with pytest.raises(ValueError, match=rf"{module}\.{name} has no place in a data set"):
        images.read_pickle(tmp_path / "x")


FORGED_DTYPE = (
    # A copy of dtype object whose flags no longer say that it holds pointers: NumPy would
    # take the bytes of the array for them.
    b"cnumpy\ndtype\n(U\x01OI00\nI01\ntR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
)
ARRAY = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\x01btR"


@pytest.mark.parametrize(
    "content",
    [
        ARRAY + b"(K\x01(K\x01t" + FORGED_DTYPE + b"\x89U\x08AAAAAAAAtbs.",
        ARRAY + b"s.",
        ARRAY + b"(K\x01(K\x01tN\x89U\x01Atbs.",
        b"\x80\x02}U\x04datacnumpy\nndarray\n)\x81s.",
        b"\x80\x02cnumpy\nndarray\n(N}U\x0c__setstate__Nstb.",
        b"\x80\x02c_codecs\nencode\n(N}X\x0c\0\0\0__defaults__Nstb.",
        b"\x80\x02c_codecs\nencode\n(X\1\0\0\0aX\x03\0\0\0zlbtR.",
    ],
    ids=["forged dtype", "no state", "no dtype", "bare", "class", "function", "codec"],
)
def test_what_is_admitted_cannot_be_abused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x is damaged"):
        images.read_pickle(tmp_path / "x")
    (tmp_path / "x").write_bytes(python2_pickle(random_images(1, 3072), [0], b"labels"))
    assert images.read_pickle(tmp_path / "x")[b"labels"] == [0], "and changes nothing for the next file"


def test_numpy_is_not_run_on_what_a_pickle_says():
    assert not [
        admitted for admitted in images.ADMITTED.values() if admitted not in (images.Inert, str.encode)
    ]


# SVHN


def write_svhn(folder, x, y):
    for name in ("train", "test"):
        scipy.io.savemat(folder / f"{name}_32x32.mat", {"X": x, "y": y}, do_compression=True)


def test_svhn(tmp_path):
    x = random_images(10, 32, 32, 3)
    y = np.arange(1, 11, dtype=np.uint8)[:, None]
    write_svhn(tmp_path, np.moveaxis(x, 0, -1), y)
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": np.moveaxis(x[:4], 0, -1), "y": y[:4]})
    train, test = images.svhn(tmp_path)
    assert_examples(train, x, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    assert_examples(test, x[:4], [1, 2, 3, 4])
    assert images.count_classes(train, test) == 10


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((32, 32, 3, 2), np.uint8), [[1]], "do not belong together"),
        (np.zeros((32, 32, 3, 2), np.uint8), [[1, 1]], r"y must be \[n, 1\]"),
        (np.zeros((32, 32, 3, 2), np.uint8), [[0], [1]], "1 to 10"),
        (np.zeros((32, 32, 3, 2), np.uint8), [[1], [11]], "1 to 10"),
        (np.zeros((32, 32, 3, 2), np.uint8), [[1], [1.5]], "1 to 10"),
        (np.zeros((32, 32, 3, 2)), [[1], [1]], "X must be uint8"),
        (np.zeros((2, 32, 32, 3), np.uint8), [[1], [1]], r"X must be uint8 \[32, 32, 3, n\]"),
        (np.zeros((32, 32, 3), np.uint8), [[1]], "X must be uint8"),
        (np.zeros((32, 32, 3, 0), np.uint8), np.zeros((0, 1)), "has no images"),
    ],
)
def test_svhn_files_that_do_not_fit(tmp_path, x, y, message):
    write_svhn(tmp_path, x, np.array(y))
    with pytest.raises(ValueError, match=rf"train_32x32\.mat.*{message}"):
        images.svhn(tmp_path)


def test_damaged_and_missing_svhn_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_32x32\.mat is not there.*--data-dir"):
        images.svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    write_svhn(tmp_path, random_images(32, 32, 3, 2), np.ones((2, 1)))
    whole = path.read_bytes()
    scipy.io.savemat(tmp_path / "other.mat", {"z": 1})
    other = (tmp_path / "other.mat").read_bytes()
    for content in (b"", b"<html>404</html>", whole[:60], whole[:1000], whole[:-10], other):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train_32x32\.mat is damaged"):
            images.svhn(tmp_path)


# Image folders


def write_image(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 6x4 images, one of them in sub-folders, in train and test."""
    x = random_images(5, 4, 6, 3)
    write_image(tmp_path / "train/dog/b.png", x[0])
    write_image(tmp_path / "train/dog/a.PNG", x[1])
    write_image(tmp_path / "train/cat/far/away/z.png", x[2])
    write_image(tmp_path / "test/dog/1.png", x[3])
    write_image(tmp_path / "test/cat/2.png", x[4])
    (tmp_path / "train/readme.txt").write_text("no class")
    (tmp_path / "train/cat/readme.txt").write_text("no image")
    return tmp_path


def test_image_folder(folder):
    x = random_images(5, 4, 6, 3)
    train, test = images.image_folder(folder)
    assert_examples(train, x[[2, 1, 0]], [0, 1, 1])
    assert_examples(test, x[[4, 3]], [0, 1])


def test_val_comes_before_test(folder):
    write_image(folder / "val/dog/x.png", random_images(1, 4, 6, 3, seed=1)[0])
    _, test = images.image_folder(folder)
    assert_examples(test, random_images(1, 4, 6, 3, seed=1), [1])


def test_images_become_rgb(tmp_path):
    grey, alpha = random_images(1, 4, 6)[0], random_images(1, 4, 6, 4)[0]
    write_image(tmp_path / "train/a/1.png", grey)
    write_image(tmp_path / "train/a/2.png", alpha)
    flat = np.full((4, 6, 3), (200, 40, 90), np.uint8)
    for name in ("1.jpg", "2.jpeg", "3.JPEG"):
        write_image(tmp_path / "val/a" / name, flat)
    train, test = images.image_folder(tmp_path)
    assert_examples(train, [np.stack([grey] * 3, -1), alpha[..., :3]], [0, 0])
    assert test.x.shape == (3, 4, 6, 3)
    np.testing.assert_allclose(test.x.astype(int), flat[None].repeat(3, 0), atol=3)


@pytest.fixture
def tiny_imagenet(tmp_path):
    """TinyImageNet's layout: flat grey JPEGs, and a test folder without labels."""
    for name, level in (("n02", 100), ("n01", 50)):
        write_image(tmp_path / f"train/{name}/images/{name}_0.JPEG", np.full((8, 8, 3), level, np.uint8))
        (tmp_path / f"train/{name}/{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t7\t7\n")
    for i in (0, 1, 2, 10):
        write_image(tmp_path / f"val/images/val_{i}.JPEG", np.full((8, 8, 3), 20 * i, np.uint8))
    lines = [
        f"val_{i}.JPEG\t{name}\t0\t0\t7\t7\n" for i, name in ((2, "n01"), (0, "n02"), (10, "n01"), (1, "n02"))
    ]
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    write_image(tmp_path / "test/images/test_0.JPEG", np.zeros((8, 8, 3), np.uint8))
    return tmp_path


def test_tiny_imagenet(tiny_imagenet):
    train, test = images.image_folder(tiny_imagenet)
    assert train.x.mean((1, 2, 3)).tolist() == [50, 100]
    assert train.y.tolist() == [0, 1]
    assert test.x.mean((1, 2, 3)).tolist() == [0, 20, 200, 40]
    assert test.y.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["val_0.JPEG\tn01", "val_1.JPEG\tn01", "val_2.JPEG\tn01"], "once: see val_10.JPEG"),
        ([f"val_{i}.JPEG\tn01" for i in (0, 1, 2, 10, 11)], "once: see val_11.JPEG"),
        ([f"val_{i}.JPEG\tn01" for i in (0, 1, 2, 10)] + ["val_1.JPEG\tn02"], "once: see val_1.JPEG"),
        ([f"val_{i}.JPEG n01" for i in (0, 1, 2, 10)], "a tab"),
    ],
)
def test_annotations_that_do_not_fit(tiny_imagenet, lines, message):
    (tiny_imagenet / "val/val_annotations.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"val_annotations\.txt.*{message}"):
        images.image_folder(tiny_imagenet)


def test_annotation_of_an_unknown_class(tiny_imagenet):
    path = tiny_imagenet / "val/val_annotations.txt"
    path.write_text(path.read_text().replace("val_10.JPEG\tn01", "val_10.JPEG\tn99"))
    with pytest.raises(ValueError, match="val: class n99 is not among"):
        images.image_folder(tiny_imagenet)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/dog/c.png", r"train/dog/c\.png is 7x5, but .*train/cat/far/away/z\.png is 6x4: resize"),
        ("test/dog/c.png", r"test/dog/c\.png is 7x5, but .*train/cat/far/away/z\.png is 6x4: resize"),
        ("train/cat/c.png", r"train/cat/far/away/z\.png is 6x4, but .*train/cat/c\.png is 7x5: resize"),
    ],
)
def test_an_image_of_another_size(folder, name, message):
    write_image(folder / name, np.zeros((5, 7, 3), np.uint8))
    with pytest.raises(ValueError, match=message):
        images.image_folder(folder)


@pytest.mark.parametrize("name", ["train/dog/b.png", "test/cat/2.png"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no image"),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path, "BMP"),
        lambda path: Image.fromarray(np.zeros((4, 6), np.uint16)).save(path),
    ],
    ids=["empty", "text", "truncated", "beheaded", "BMP", "16 bits"],
)
def test_corrupt_images(folder, name, harm):
    harm(folder / name)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        images.image_folder(folder)


def test_classes_unknown_or_empty(folder):
    write_image(folder / "test/bird/1.png", np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(ValueError, match=r"test: class bird is not among the folders in .*train"):
        images.image_folder(folder)
    (folder / "train/bird").mkdir()
    with pytest.raises(ValueError, match="train/bird has no PNG or JPEG files"):
        images.image_folder(folder)


def test_missing_image_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train is not there.*train/<class>"):
        images.image_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="test is not there"):
        images.image_folder(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="train has no images"):
        images.image_folder(tmp_path)
    write_image(tmp_path / "train/a/1.png", np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(ValueError, match="val has no images"):
        images.image_folder(tmp_path)


# Loading by name


def test_every_loader_is_reached_by_name(fashion_dir, monkeypatch):
    assert images.load("digits", None)[1].size == images.load("digits", fashion_dir / "none")[1].size == 360
    assert images.load("fashion-mnist", fashion_dir)[0].size == 12
    monkeypatch.setattr(images, "FASHION_MNIST_DIR", fashion_dir)
    assert images.load("fashion-mnist", None)[1].size == 5
    write_svhn(fashion_dir, random_images(32, 32, 3, 2), np.ones((2, 1), np.uint8))
    assert images.load("svhn", fashion_dir)[0].size == 2


@pytest.mark.parametrize(
    ("dataset", "files"),
    [
        ("cifar10", "test_batch"),
        ("cifar100", "cifar-100-python"),
        ("svhn", r"train_32x32\.mat"),
        ("image-folder", "train/<class>"),
    ],
)
def test_data_sets_that_need_a_folder(dataset, files):
    with pytest.raises(ValueError, match=rf"{dataset} needs --data-dir: .*{files}"):
        images.load(dataset, None)


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"one of digits, fashion-mnist, cifar10, .*not 'mnist'"):
        images.load("mnist", None)


# Classes and partition


def numbered(size, offset=0):
    """Examples that differ: image i is its number in 2 pixels, its label the number modulo 7."""
    numbers = np.arange(offset, offset + size)
    x = np.stack([numbers // 256, numbers % 256], 1).astype(np.uint8).reshape(-1, 1, 2, 1)
    return Examples(x, (numbers % 7).astype(np.int32))


def numbers(pool):
    pixels = pool.x.reshape(-1, 2).astype(int)
    found = 256 * pixels[:, 0] + pixels[:, 1]
    np.testing.assert_array_equal(found % 7, pool.y, "images and labels stay together")
    return found.tolist()


def test_classes_are_counted_by_the_largest_label():
    x = np.zeros((3, 1, 1, 1), np.uint8)
    gaps, all_zero = (Examples(x, np.array(y, np.int32)) for y in ([0, 4, 9], [0, 0, 0]))
    assert images.count_classes(gaps) == 10
    assert images.count_classes(all_zero, gaps) == 10
    assert images.count_classes(all_zero) == 1
    assert type(images.count_classes(gaps)) is int


def test_rows_of_examples():
    part = numbered(10)[np.array([7, 2])]
    assert numbers(part) == [7, 2]
    assert part.size == 2


def test_partition():
    pools = numbered(1000), numbered(300, 5000)
    data = images.partition(*pools, train_size=500, validation_size=200, test_size=100, seed=1)
    train, validation, test = (numbers(part) for part in data)
    assert (len(train), len(validation), len(test)) == (500, 200, 100)
    assert len(set(train) | set(validation)) == 700, "disjoint"
    assert set(train) | set(validation) <= set(range(1000))
    assert len(set(test)) == 100
    assert set(test) <= set(range(5000, 5300))
    for part in (train, validation, test):
        assert part != sorted(part), "shuffled"
        middle = 5150 if part is test else 500
        assert abs(np.mean(part) - middle) < 50, "from everywhere in the pool"


def test_partition_is_determined_by_the_seed():
    pools = numbered(1000), numbered(300)
    parts = [
        images.partition(*pools, train_size=n, validation_size=100, test_size=50, seed=seed)
        for n, seed in ((400, 0), (400, 0), (400, 1), (300, 0))
    ]
    same, again, other, fewer = ([numbers(part) for part in data] for data in parts)
    assert same == again
    assert all(a != b for a, b in zip(same, other, strict=True))
    assert fewer[0] == same[0][:300]
    assert fewer[1] == same[0][300:], "one permutation: validation follows train"
    assert fewer[2] == same[2]


def test_partition_takes_all_that_is_left():
    pools = numbered(100), numbered(30)
    data = images.partition(*pools, train_size=None, validation_size=10, test_size=None, seed=0)
    assert (data.train.size, data.validation.size, data.test.size) == (90, 10, 30)
    assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(100))
    assert sorted(numbers(data.test)) == list(range(30))
    full = images.partition(*pools, train_size=90, validation_size=10, test_size=30, seed=0)
    assert numbers(full.train) == numbers(data.train)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_size": 0}, "train_size must be at least 1, not 0"),
        ({"validation_size": 0}, "validation_size must be at least 1, not 0"),
        ({"test_size": -1}, "test_size must be at least 1, not -1"),
        ({"train_size": 91}, "train_size=91 and validation_size=10 are more than the 100"),
        ({"validation_size": 100}, "validation_size=100 leaves nothing .* 100 examples"),
        ({"validation_size": 100, "train_size": None}, "validation_size=100 leaves nothing .* 100 examples"),
        ({"test_size": 31}, "test_size=31 is more than the 30"),
    ],
)
def test_sizes_that_do_not_fit(changed, message):
    sizes = {"train_size": 90, "validation_size": 10, "test_size": 30}
    assert images.partition(numbered(100), numbered(30), **sizes, seed=0).train.size == 90
    with pytest.raises(ValueError, match=message):
        images.partition(numbered(100), numbered(30), **(sizes | changed), seed=0)
