"""python -m eupmu_jax, and eupmu --version, say what a bug report needs."""

import importlib.metadata

import jax
import pytest

from eupmu_jax import __main__, __version__
from eupmu_jax.cli.main import main as eupmu


@pytest.mark.parametrize("command", [__main__.main, lambda: eupmu(["--version"])])
def test_versions_and_devices(command, capsys):
    command()
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert said["eupmu_jax"] == __version__ == importlib.metadata.version("eupmu_jax")
    assert said["jax"] == jax.__version__
    assert said["devices"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def test_an_extra_that_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "PACKAGES", ("jax", "no-such-package"))
    __main__.main()
    assert "no-such-package   not installed" in capsys.readouterr().out
