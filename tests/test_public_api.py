"""What the package promises at its surface: names, docstrings, imports, strict arithmetic."""

import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import eupmu_jax as eu
from eupmu_jax import evaluation, objectives

ROOT = pathlib.Path(__file__).parent.parent


PUBLIC = [getattr(module, name) for module in (eu, evaluation, objectives) for name in module.__all__]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_every_public_name_is_documented(thing):
    doc = inspect.getdoc(thing)
    sections = ["Args:", "Source:"]
    if not inspect.isclass(thing):
        sections += ["Returns:", "Raises:", "Example:", ">>> "]
    assert doc is not None
    assert not [section for section in sections if section not in doc]


def test_import_needs_core_dependencies_only():
    """Neither Flax nor an extra is imported with the package."""
    code = (
        "import sys; import eupmu_jax; "
        "extras = {'flax', 'sklearn', 'scipy.optimize', 'matplotlib', 'rich', 'tyro', 'orbax'}; "
        "sys.exit(', '.join(extras & sys.modules.keys()) or None)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_state_is_small_and_made_of_arrays():
    params = {"w": jnp.ones((100, 100))}
    tx = eu.eupmu(lambda p, b: eu.Losses(1.0, jnp.ones(3)), optax.sgd(0.1), initial_multiplier=jnp.ones(3))
    leaves = jax.tree.leaves(tx.init(params))
    assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) <= 22


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("utilities", [(), (3,)])
@pytest.mark.parametrize("log_losses", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_own_arithmetic_is_strict(utilities, log_losses, dtype):
    """Every transformation under strict dtype and rank promotion, in mixed precision."""
    params = {"w": jnp.ones((2, 3), dtype)}

    def losses_fn(params, batch):
        retain = jnp.sum(params["w"] ** 2).astype(jnp.float32)
        return eu.Losses(jnp.sum(params["w"]), jnp.broadcast_to(retain, utilities) * batch)

    settings = {
        "initial_multiplier": jnp.ones(utilities),
        "tolerance": jnp.zeros(utilities),
        "dual_optimizer": optax.sgd(0.1),
        "log_losses": log_losses,
    }
    batch = jnp.float32(2)
    for measure in ("lookahead", "lagged", "directional"):
        tx = eu.eupmu(losses_fn, optax.sgd(0.1), measure=measure, **settings)
        state = tx.init(params)
        for _ in range(2):
            _, state = jax.jit(tx.update)(params, state, params, batch=batch)
        assert int(eu.surgery_info(state).skipped_steps) == 0
    surgery = eu.implicit_surgery(**settings)
    state = surgery.init(params)
    losses, grads = surgery.value_and_grad(losses_fn)(params, batch, state)
    surgery.update(grads, state, params, losses=losses)
    _, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(params, batch)
    exact = eu.explicit_surgery(tolerance=jnp.zeros(utilities))
    exact.update(forget_grads, exact.init(params), params, retain_grads=retain_grads)


def test_readme_examples_run(tmp_path, monkeypatch):
    """Each on the names that the text says are there."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    batch = {"forget": jnp.ones(3), "retain": jnp.zeros(3)}
    names = {
        "before": 0.1,
        "loss": lambda params, part: jnp.mean((params - part) ** 2),
        **{name: jnp.broadcast_to(part, (64, 3)) for name, part in batch.items()},
        "batch": batch,
    }
    for block in blocks:
        names["params"] = start = jnp.full(3, 0.3)
        exec(block, names)
        if block is blocks[2]:
            names["params"], names["state"], _ = names["step"](start, names["state"], batch)
        assert not jnp.array_equal(names["params"], start)
    assert len(names["history"].steps["violation"]) == 1000
    assert int(eu.surgery_info(names["state"]).skipped_steps) == 0


@pytest.mark.parametrize(
    "page", ["README.md", "experiments/classification/README.md", "experiments/knobs/README.md"]
)
def test_tables_show_the_committed_results(page):
    """Every row of figures in a README stands in a committed table."""
    rows = lambda path: {
        " | ".join(cell.strip() for cell in line.strip("|").split("|"))
        for line in path.read_text().splitlines()
        if line.startswith("|")
    }
    committed = set().union(*map(rows, (ROOT / "experiments").glob("*/results/**/tables.md")))
    of_figures = re.compile(r"[^|]+(\| [\d.±/() -]+)+")
    figures = {row for row in rows(ROOT / page) if of_figures.fullmatch(row) and "." in row}
    assert len(figures) > 15
    assert not figures - committed
