"""A user's script passes a type checker: README's examples, and what else optax's types make hard."""

import json
import subprocess
import sys

import pytest

from tests.test_readme import ROOT, examples

SCRIPT = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import eupmu_jax as eu
from eupmu_jax import evaluation, objectives
from eupmu_jax.flax import TrainState

model = nn.Dense(3)
x, y = np.ones((8, 4), np.float32), np.zeros(8, int)
params = {"kernel": jnp.ones((4, 3))}
batch = {"forget": (x, y), "retain": (x, y)}


def losses_fn(params: dict, batch: dict[str, tuple[jax.Array, jax.Array]]) -> eu.Losses:
    logits = {name: x @ params["kernel"] for name, (x, _) in batch.items()}
    forget = objectives.unlikelihood(logits["forget"], batch["forget"][1], mask=np.ones(8, bool))
    retain = objectives.cross_entropy(logits["retain"], batch["retain"][1])
    return eu.Losses(objectives.masked_mean(forget), retain.mean())


for constraint in (eu.Budget(0.1), eu.Budget([0.1, 0.2]), eu.Tolerance(lambda step: 0.01 * step)):
    tx = eu.eupmu(losses_fn, optax.adam(1e-3), constraint, initial_multiplier=jnp.ones(2))
    state = tx.init(params)
    for _ in range(10):
        updates, state = tx.update(None, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
    violation: jax.Array = eu.surgery_info(state).violation
    weight: float = float(eu.multiplier(state))

tx = optax.chain(eu.eupmu(losses_fn, None, eu.Tolerance(0.01)), optax.clip_by_global_norm(1.0))
train_state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
train_state = train_state.apply_gradients(extra_args={"batch": batch})
step, params, state = eu.training_step(tx, params)
params, state, info = step(params, state, batch)
skipped: int = int(info.skipped_steps)

network = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
graph, weights, rest = nnx.split(network, nnx.Param, ...)
outputs = lambda weights, rows: nnx.merge(graph, weights, rest)(rows)
nnx_losses = lambda weights, batch: eu.Losses(outputs(weights, batch).min(), outputs(weights, batch).max())
tx = eu.eupmu(nnx_losses, optax.sgd(0.1), eu.Budget(0.1))
nnx.Optimizer(network, tx, wrt=nnx.Param).update(network, None, batch=batch)

eu.export_model("trained", model.apply, model.init(jax.random.key(0), x), x)
apply, named = eu.load_model("trained")
evaluation.accuracy(jax.nn.softmax(apply(named, x)), y)
evaluation.likelihood_ratio_attack([[4.0], [5.0], [6.0]], np.zeros((3, 1)))["per_example"].mean()
"""


@pytest.mark.slow
def test_a_users_scripts_pass_pyright(tmp_path):
    (tmp_path / "given.py").write_text((ROOT / "tests" / "readme_given.py").read_text())
    # Each example sees the names of those before it, and may define one of them anew.
    before = "given"
    for number, block in enumerate(examples()):
        names = f"from {before} import *  # pyright: ignore[reportAssignmentType]"
        (tmp_path / f"example_{number}.py").write_text(f"{names}\n\n{block}")
        before = f"example_{number}"
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
