"""What README's examples leave open: a trained model, the two sets, and batches of them."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax


def apply(params: dict[str, jax.Array], x: jax.Array | np.ndarray) -> jax.Array:
    return jnp.tanh(x @ params["hidden"]) @ params["out"] + params["bias"]


def _class_of(label: int, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(label)
    x = rng.normal(size=(rows, 4)) + 2.5 * np.eye(4)[label]
    return {"x": x.astype(np.float32), "y": np.full(rows, label)}


def _trained(x: np.ndarray, y: np.ndarray) -> dict[str, jax.Array]:
    hidden, out = (0.5 * jax.random.normal(key, (4, 4)) for key in jax.random.split(jax.random.key(0)))
    params = {"hidden": hidden, "out": out[:, :3], "bias": jnp.zeros(3)}
    tx = optax.adam(0.05)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(partial(jax.lax.scan, step, length=200))((params, tx.init(params)), None)
    return params


_classes = [_class_of(label, 200) for label in range(3)]
_all = {name: np.concatenate([each[name] for each in _classes]) for name in ("x", "y")}

params: dict[str, jax.Array] = _trained(**_all)
forget: dict[str, np.ndarray] = _classes[2]
retain: dict[str, np.ndarray] = {name: rows[:400] for name, rows in _all.items()}


def _rows(data: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    chosen = rng.choice(len(data["y"]), 64, replace=False)
    return {name: rows[chosen] for name, rows in data.items()}


_rng = np.random.default_rng(3)
batches: Iterable[dict[str, dict[str, np.ndarray]]] = [
    {"forget": _rows(forget, _rng), "retain": _rows(retain, _rng)} for _ in range(1000)
]
