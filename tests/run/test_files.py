"""Whole files, and what made them."""

import json

from eupmu_jax.run import provenance
from eupmu_jax.run.files import write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    path.with_name("a.json.partial").write_text("left by a run that was killed")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    write_whole(path, b"\xff\x00")
    assert path.read_bytes() == b"\xff\x00"


def test_links_are_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "a.json"
    for link in (path, path.with_name("a.json.partial")):
        link.symlink_to(outside)
        write_whole(path, "new")
        assert outside.read_text() == "untouched"
        assert path.read_text() == "new"
        assert not path.is_symlink()
    assert [one.name for one in folder.iterdir()] == ["a.json"]


def test_provenance_is_json_and_needs_no_git(monkeypatch):
    made_by = provenance.provenance("scipy")
    assert json.loads(json.dumps(made_by)) == made_by
    assert {"python", "jax", "eupmu_jax", "scipy"} <= made_by["versions"].keys()
    assert made_by["commit"] != "unknown"
    monkeypatch.setenv("PATH", "")
    assert provenance.provenance()["commit"] == "unknown"


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == "unknown"
