"""Image data sets from their standard files, and their partition into training, validation and test."""

import gzip
import io
import math
import pathlib
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.io
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FASHION_MNIST_DIR = pathlib.Path("/usr/share/datasets/fashion-mnist")

EXPECTED_FILES = {
    "cifar10": "cifar-10-batches-py/data_batch_1, ..., data_batch_5 and test_batch",
    "cifar100": "cifar-100-python/train and test",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "image-folder": "train/<class>/*.png or *.jpg, and val/ or test/ of the same form",
}


class Examples(NamedTuple):
    """Images, uint8 [n, height, width, channels], and labels, int32 [n]."""

    x: Any
    y: Any

    def __getitem__(self, rows):  # type: ignore[override]
        return Examples(self.x[rows], self.y[rows])

    @property
    def size(self) -> int:
        return len(self.y)


class Data(NamedTuple):
    """What is trained on, what hyper-parameters are chosen on, and what is reported on."""

    train: Examples
    validation: Examples
    test: Examples


Pools = tuple[Examples, Examples]


def digits() -> Pools:
    """scikit-learn's digits, [n, 8, 8, 1]: 1,437 for training and 360 for testing."""
    x, y = (np.asarray(part) for part in load_digits(return_X_y=True))
    data = checked("digits", np.rint(x * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1), y)
    train, test = train_test_split(np.arange(len(y)), test_size=360, random_state=0, stratify=y)
    return data[train], data[test]


def fashion_mnist(directory: pathlib.Path) -> Pools:
    """Fashion-MNIST's four IDX files, [n, 28, 28, 1]."""

    def part(prefix):
        path = directory / f"{prefix}-images-idx3-ubyte"
        x = read_idx(path)
        if x.shape[1:] != (28, 28):
            raise ValueError(f"{path}: images [n, 28, 28] are expected, not {list(x.shape)}")
        return checked(path, x[..., None], read_idx(directory / f"{prefix}-labels-idx1-ubyte"))

    return part("train"), part("t10k")


def cifar10(directory: pathlib.Path) -> Pools:
    """CIFAR-10's Python pickles, [n, 32, 32, 3]; the folder is theirs or its parent."""
    folder = inner_folder(directory, "cifar-10-batches-py")
    paths = sorted(folder.glob("data_batch_*")) or [folder / "data_batch_1"]
    batches = [read_cifar(path, "cifar10", b"labels") for path in paths]
    train = Examples(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    return train, read_cifar(folder / "test_batch", "cifar10", b"labels")


def cifar100(directory: pathlib.Path) -> Pools:
    """CIFAR-100's Python pickles, [n, 32, 32, 3], with fine labels; the folder is theirs or its parent."""
    folder = inner_folder(directory, "cifar-100-python")
    train, test = (read_cifar(folder / name, "cifar100", b"fine_labels") for name in ("train", "test"))
    return train, test


def svhn(directory: pathlib.Path) -> Pools:
    """SVHN's cropped digits from its MATLAB files, [n, 32, 32, 3]."""

    def part(name):
        path = existing(directory / name, "svhn")
        try:
            content = scipy.io.loadmat(path)
            x, y = content["X"], content["y"]
        except Exception as error:  # a damaged file raises nearly anything
            raise damaged(path, error) from error
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
            raise ValueError(f"{path}: X must be uint8 [32, 32, 3, n], not {x.dtype} {list(x.shape)}")
        if y.ndim != 2 or y.shape[1] != 1 or not np.isin(y, np.arange(1, 11)).all():
            raise ValueError(f"{path}: y must be [n, 1] of 1 to 10, where 10 is the digit 0")
        return checked(path, x.transpose(3, 0, 1, 2), y[:, 0].astype(np.int32) % 10)

    return part("train_32x32.mat"), part("test_32x32.mat")


def image_folder(directory: pathlib.Path) -> Pools:
    """PNG and JPEG files in train/<class>/ and in val/ (else test/), as RGB of one size.

    What is in val may also be listed as in TinyImageNet: val/images and val/val_annotations.txt.
    """
    held_out = directory / ("val" if (directory / "val").is_dir() else "test")
    for folder in (directory / "train", held_out):
        if not folder.is_dir():
            raise missing(folder, "image-folder")
    annotations = held_out / "val_annotations.txt"
    train = files_by_class(directory / "train")
    test = annotated_files(annotations) if annotations.exists() else files_by_class(held_out)
    classes = sorted({name for _, name in train})
    for folder, files in ((directory / "train", train), (held_out, test)):
        if not files:
            raise ValueError(f"{folder} has no images: {EXPECTED_FILES['image-folder']} are expected")
    unknown = sorted({name for _, name in test} - set(classes))
    if unknown:
        raise ValueError(f"{held_out}: class {unknown[0]} is not among the folders in {directory / 'train'}")
    label = {name: number for number, name in enumerate(classes)}
    first = train[0][0]

    def part(folder, files):
        x = read_images([path for path, _ in files], first)
        return checked(folder, x, np.array([label[name] for _, name in files]))

    return part(directory / "train", train), part(held_out, test)


def checked(source: Any, x: np.ndarray, y: np.ndarray) -> Examples:
    """Images, uint8 [n, height, width, channels], with their labels; ValueError if they do not fit."""
    if y.shape != x.shape[:1]:
        raise ValueError(f"{source}: images {x.shape} and labels {y.shape} do not belong together")
    if not len(x):
        raise ValueError(f"{source} has no images: get the file again")
    if y.min() < 0 or y.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{source}: labels must count from 0 within int32, not {y.min()} to {y.max()}")
    return Examples(np.ascontiguousarray(x), y.astype(np.int32))


def existing(path: pathlib.Path, dataset: str) -> pathlib.Path:
    """The path itself, if there is a file; FileNotFoundError that says what is expected otherwise."""
    if not path.is_file():
        raise missing(path, dataset)
    return path


def missing(path: pathlib.Path, dataset: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} is not there: give with --data-dir the folder of {EXPECTED_FILES[dataset]}"
    )


def damaged(path: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or of another format, get it again: {error!r}")


def inner_folder(directory: pathlib.Path, name: str) -> pathlib.Path:
    """directory/name if there is such a folder, else the directory itself."""
    return directory / name if (directory / name).is_dir() else directory


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


def read_cifar(path: pathlib.Path, dataset: str, label_key: bytes) -> Examples:
    """One of CIFAR's pickles, whose images are stored channel first, as [n, 32, 32, 3]."""
    content = read_pickle(existing(path, dataset))
    x, labels = content.get(b"data"), content.get(label_key)
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != 3072:
        raise ValueError(f"{path}: b'data' must be an array [n, 3072]; is this a file of {dataset}?")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise ValueError(f"{path}: {label_key!r} must be a list of integers; is this a file of {dataset}?")
    return checked(path, x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels))


class Inert:
    """Stands for a NumPy object within a pickle: keeps what it was made from and does nothing."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


# NumPy itself must not see what an untrusted file says: dtype's flags, for one, can make it take raw bytes
# for pointers. And str.encode, unlike codecs.encode or a Python function, has nothing that could be replaced.
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): Inert,
    ("numpy._core.multiarray", "_reconstruct"): Inert,
    ("numpy", "ndarray"): Inert,
    ("numpy", "dtype"): Inert,
    ("_codecs", "encode"): str.encode,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Looks nothing up but the few names that arrays and byte strings need, and runs none of NumPy."""

    def find_class(self, module, name):
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a data set")
        return ADMITTED[module, name]


def read_pickle(path: pathlib.Path) -> dict:
    """The dict in a pickle, its arrays uint8; runs no code from it, ValueError if it holds anything else."""
    raw = path.read_bytes()
    try:
        content = RestrictedUnpickler(io.BytesIO(raw), encoding="bytes").load()
        return {key: as_array(value) if isinstance(value, Inert) else value for key, value in content.items()}
    except Exception as error:  # a damaged pickle raises nearly anything
        raise damaged(path, error) from error


def as_array(pickled: Inert) -> np.ndarray:
    """The array, uint8, that a pickle describes."""
    _, shape, dtype, fortran, raw = pickled.state
    if dtype.arguments[0] not in ("u1", b"u1"):
        raise ValueError(f"arrays must be uint8, not {dtype.arguments[0]!r}")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The PNG and JPEG files anywhere below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".png", ".jpg", ".jpeg"})


def files_by_class(folder: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Every image with the name of the class, which is a sub-folder's."""
    files = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        paths = image_files(class_folder)
        if not paths:
            raise ValueError(f"{class_folder} has no PNG or JPEG files: add some, or remove the folder")
        files += [(path, class_folder.name) for path in paths]
    return files


def annotated_files(annotations: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Every image in TinyImageNet's val/images with the name of its class, sorted by file."""
    lines = annotations.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = sorted(tuple(line.split("\t")[:2]) for line in lines)
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{annotations}: every line must be a file's name, a tab, its class, ...")
    images = annotations.parent / "images"
    listed, found = Counter(row[0] for row in rows), Counter(path.name for path in image_files(images))
    odd = sorted((listed - found) + (found - listed))
    if odd:
        raise ValueError(f"{annotations} must list every file in {images} once: see {odd[0]}")
    return [(images / name, class_name) for name, class_name in rows]


def read_images(paths: Sequence[pathlib.Path], first: pathlib.Path) -> np.ndarray:
    """Images of the same size as the first, uint8 [n, height, width, 3]."""
    shape = read_image(first).shape
    x = np.empty((len(paths), *shape), np.uint8)
    for row, path in enumerate(paths):
        image = read_image(path)
        if image.shape != shape:
            raise ValueError(
                f"{path} is {image.shape[1]}x{image.shape[0]}, but {first} is {shape[1]}x{shape[0]}: "
                "resize the images to one size"
            )
        x[row] = image
    return x


def read_image(path: pathlib.Path) -> np.ndarray:
    """A PNG or JPEG file as RGB, uint8 [height, width, 3]; ValueError if it is damaged."""
    try:
        # Pillow goes by content, not by name, and some formats are passed on to other programs.
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode.startswith("I"):  # convert would clip all but the darkest pixels to white
                raise ValueError("16-bit grey images are not supported, convert them to 8 bits")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged image raises nearly anything
        raise damaged(path, error) from error


LOADERS: dict[str, Callable[..., Pools]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "image-folder": image_folder,
}


def load(dataset: str, directory: pathlib.Path | None) -> Pools:
    """A data set's training and test pool; digits needs no folder, fashion-mnist has a default."""
    if dataset not in LOADERS:
        raise ValueError(f"dataset must be one of {', '.join(LOADERS)}, not {dataset!r}")
    if dataset == "digits":
        return digits()
    if directory is None and dataset == "fashion-mnist":
        directory = FASHION_MNIST_DIR
    if directory is None:
        raise ValueError(f"{dataset} needs --data-dir: the folder of {EXPECTED_FILES[dataset]}")
    return LOADERS[dataset](directory)


def count_classes(*pools: Examples) -> int:
    """How many classes there are by the largest label."""
    return 1 + max(int(pool.y.max()) for pool in pools)


def partition(
    train_pool: Examples,
    test_pool: Examples,
    *,
    train_size: int | None,
    validation_size: int,
    test_size: int | None,
    seed: int,
) -> Data:
    """Disjoint random parts of the training pool, and one of the test pool; None is all that is left."""
    sizes = {"train_size": train_size, "validation_size": validation_size, "test_size": test_size}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    if validation_size >= train_pool.size:
        raise ValueError(
            f"validation_size={validation_size} leaves nothing to train on: "
            f"the training pool has {train_pool.size} examples"
        )
    if train_size is None:
        train_size = train_pool.size - validation_size
    if train_size + validation_size > train_pool.size:
        raise ValueError(
            f"train_size={train_size} and validation_size={validation_size} are more than "
            f"the {train_pool.size} examples of the training pool: lower one of them"
        )
    if test_size is not None and test_size > test_pool.size:
        raise ValueError(f"test_size={test_size} is more than the {test_pool.size} examples of the test pool")
    rng = np.random.default_rng(seed)
    order = rng.permutation(train_pool.size)
    return Data(
        train_pool[order[:train_size]],
        train_pool[order[train_size : train_size + validation_size]],
        test_pool[rng.permutation(test_pool.size)[:test_size]],
    )
