"""Studies stand beside each other: each on its own, all of them on what they share."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
STUDIES = sorted(path.parent.name for path in EXPERIMENTS.glob("*/__main__.py"))


def imports(path):
    """Every module that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("room", [*STUDIES, "shared"])
def test_no_study_imports_another(room):
    own = {room, "shared"}
    for path in (EXPERIMENTS / room).rglob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name and name.startswith("experiments.")}
        assert used <= own, path


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_says_what_it_is_and_how_to_run_it(study):
    text = (EXPERIMENTS / study / "README.md").read_text()
    assert f"    python -m experiments.{study}" in text
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (EXPERIMENTS / study / link).exists(), link
    index = (EXPERIMENTS / "README.md").read_text()
    assert f"[{study}]({study}/README.md)" in index
    assert f"`python -m experiments.{study}`" in index


def run_with(code, *arguments):
    """A fresh process that runs `code` and then a study as `python -m` does."""
    as_command = f"import runpy, sys\n{code}\nsys.argv = ['', *{list(arguments)!r}]\n"
    return subprocess.run(
        [sys.executable, "-c", as_command + "runpy._run_module_as_main('experiments.soak')"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )


def test_a_missing_extra_is_one_line_that_says_what_to_do():
    hidden = (
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name in ('pandas', 'tyro') else find(name, *more)"
    )
    done = run_with(hidden)
    assert done.returncode == 1
    assert 'the extra "experiments" is missing (no pandas, tyro)' in done.stderr
    assert 'pip install -e ".[experiments]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("OSError('disk full')", 1, "error: disk full"),
        ("RuntimeError('diverged')", 1, "error: diverged"),
        ("ModuleNotFoundError('No module named \"orbax\"')", 1, '".[experiments]"'),
        ("KeyboardInterrupt()", 130, "Interrupted: start again"),
    ],
)
def test_how_a_study_ends(error, status, said, tmp_path):
    code = f"def fail(*args, **settings):\n    raise {error}\nimport eupmu_jax\neupmu_jax.unlearn = fail"
    done = run_with(code, "--runs-dir", str(tmp_path))
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
