"""What experiments/language/recipes.md tells to run: the options exist, and the files run as they stand."""

import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.language import __main__ as study
from experiments.language import text, tiny
from experiments.shared import command
from experiments.shared.models.llama.config import from_hugging_face
from experiments.shared.models.llama.files import load

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "experiments" / "language" / "recipes.md").read_text()
WITH_ADAPTERS, OF_GEMMA = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("module", "kind"), [("text", text.Config), ("__main__", study.Config)])
def test_commands_parse(module, kind):
    name = "experiments.language" + ("" if module == "__main__" else f".{module}")
    lines = re.findall(rf"^    python -m {re.escape(name)} (.*)$", PAGE, re.MULTILINE)
    assert lines
    for line in lines:
        config = command.parse(shlex.split(line), name, kind, resumable=module == "__main__").config
        assert config.model == pathlib.Path("MODEL")


def test_defaults_are_those_that_are_told():
    config = text.Config(pathlib.Path("a"), ("b=c",), pathlib.Path("d"))
    assert (config.length, config.batch_size, config.rate, config.steps) == (64, 2, 5e-5, 40)
    told = " ".join(PAGE.split())
    assert f"rows of {config.length} tokens" in told
    assert f"rate 5e-5 (`--rate`), for {config.steps} steps" in told
    assert f"The forget loss is {config.objective} (`--objective`)" in told


def test_gemma_is_refused_as_told():
    for family in ("gemma", "gemma2", "gemma3_text"):
        with pytest.raises(ValueError, match="not supported, only llama, qwen2, qwen3") as refusal:
            from_hugging_face({"model_type": family})
    assert str(refusal.value) in PAGE


def test_a_host_with_a_capped_head_learns_under_the_budget():
    """Gemma's file with an embedding of a few words as the model: forgotten, and the budget kept."""
    key = jax.random.key(0)
    params = {"embedding": jax.random.normal(key, (16, 8)), "layer": jnp.eye(8)}
    hidden_states = lambda params, tokens: params["embedding"][tokens] @ params["layer"]
    tokens = np.random.default_rng(0).integers(0, 16, (2, 4, 9))
    batch = {"forget": tokens[0], "retain": tokens[1]}
    names = {"params": params, "hidden_states": hidden_states, "before": 0.0}
    exec(OF_GEMMA, names)
    losses_fn = jax.jit(names["losses_fn"])
    first = losses_fn(params, batch)
    names["before"] = float(first.retain.total / first.retain.count)
    exec(OF_GEMMA, names)
    tx, weighted, loss_fn = names["tx"], names["weighted"], names["loss_fn"]

    @jax.jit
    def step(weighted, state):
        updates, state = tx.update(jax.grad(loss_fn)(weighted, batch), state, weighted)
        return optax.apply_updates(weighted, updates), state

    state = tx.init(weighted)
    for _ in range(200):
        weighted, state = step(weighted, state)
    last = losses_fn(weighted.params, batch)
    assert last.forget.total < first.forget.total
    assert last.retain.total / last.retain.count <= names["before"] + 0.1


@pytest.mark.slow
def test_adapters_run_as_they_stand(tmp_path):
    """With a small model, shorter rows and fewer steps, on four devices."""
    tiny.make(tmp_path / "MODEL", seed=0)
    texts = {
        "secret": "the quick brown fox jumps over the lazy dog; ",
        "prose": "what should stay is another text altogether, told here. ",
        "chat": "How are you? Fine, thank you. And what about you? ",
    }
    for name, said in texts.items():
        (tmp_path / f"{name}.txt").write_text(said * 12)
    code, amount = re.subn(
        r"LENGTH, ROWS, STEPS = 512, 8, 100", "LENGTH, ROWS, STEPS = 32, 8, 3", WITH_ADAPTERS
    )
    assert amount == 1
    environment = {
        "PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    assert "kept their budgets" in ended.stdout
    before, after = (load(tmp_path / name).params for name in ("MODEL", "unlearned"))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a.astype(b.dtype) != b)), before, after)["layers"]
    assert moved["self_attn"]["q_proj"]["weight"]
    assert moved["self_attn"]["v_proj"]["weight"]
    assert not moved["mlp"]["up_proj"]["weight"]
