"""`saddle_point` against `implicit_surgery`; `python -m tests.lagrangian_parity` prints the differences."""

import os

if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import eupmu_jax as eu
from eupmu_jax import flax as for_nnx
from tests.method.test_lagrangian import (
    CLIPPED,
    INNERS,
    STEPS,
    both,
    constraints,
    first_multiplier,
    gradient_step,
    implicit_step,
    on_noisy_labels,
)
from tests.parity import problem

PLAIN = optax.sgd(0.05, momentum=0.9)


def largest(found, expected) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, float) - np.asarray(b, float)))) for a, b in pairs)


def step_for_step(name, inner, utilities) -> float:
    """The parameters and all of `surgery_info`, after each of the steps."""
    losses_fn, params, batch = problem(utilities)
    losses_fn, noise = on_noisy_labels(losses_fn, batch)
    ours, theirs = both(
        losses_fn, params, constraints(utilities)[name], inner, first_multiplier(utilities), noise
    )
    return largest((ours[0].params, ours[1]), theirs)


def with_implicit_surgery(utilities, inner, cast):
    """Where the undivided batch leads under `implicit_surgery`; and a budget's settings."""
    losses_fn, params, batch = problem(utilities, plain=True)
    params = jax.tree.map(lambda leaf: leaf.astype(cast), params)
    settings = {"initial_multiplier": first_multiplier(utilities)}
    budget = constraints(utilities)["budget"]
    surgery = eu.implicit_surgery(budget, **settings)
    tx = optax.chain(surgery, inner)
    step = jax.jit(implicit_step(losses_fn, surgery, tx))
    end, state = params, tx.init(params)
    for _ in range(STEPS):
        end, state = step(end, state, batch)
    return losses_fn, params, batch, budget, settings, (end, eu.surgery_info(state))


def wrapped(wrap, utilities, inner=CLIPPED, cast=jnp.float64, parts=1, donated=False, stored=False) -> float:
    """At the end, with an optimiser that `wrap` makes of the settings, and micro-batches."""
    losses_fn, params, batch, budget, settings, expected = with_implicit_surgery(utilities, inner, cast)
    tx = wrap(inner, budget, settings)
    weighted = jax.tree.map(jnp.copy, eu.weighted(params, budget, **settings))
    step = jax.jit(gradient_step(eu.lagrangian(losses_fn), tx), donate_argnums=(0, 1) if donated else ())
    carry = weighted, tx.init(weighted)
    split = lambda leaf, part: leaf.reshape(parts, -1, *leaf.shape[1:])[part]
    for number in range(STEPS):
        for part in range(parts):
            carry = step(*carry, jax.tree.map(lambda leaf, part=part: split(leaf, part), batch))
        if stored and number == STEPS // 2:
            empty = jax.tree.map(jnp.zeros_like, carry)
            data = flax.serialization.to_bytes(carry)
            carry = jax.tree.map(jnp.asarray, flax.serialization.from_bytes(empty, data))
    return largest((carry[0].params, eu.surgery_info(carry[1])), expected)


def nnx_module(utilities) -> float:
    losses_fn, params, batch, budget, settings, expected = with_implicit_surgery(
        utilities, CLIPPED, jnp.float64
    )

    class Model(nnx.Module):
        def __init__(self):
            self.v, self.w = nnx.Param(params["v"]), nnx.Param(params["w"])

    of = lambda model, batch: losses_fn({"v": model.v[...], "w": model.w[...]}, batch)
    module = for_nnx.Weighted(Model(), budget, **settings)
    optimizer = nnx.Optimizer(module, for_nnx.saddle_point(CLIPPED, budget, **settings), wrt=nnx.Param)
    step = nnx.jit(lambda module, optimizer, batch: optimizer.update(
        module, nnx.grad(for_nnx.lagrangian(of))(module, batch)
    ))  # fmt: skip
    for _ in range(STEPS):
        step(module, optimizer, batch)
    found = {"v": module.model.v[...], "w": module.model.w[...]}
    return largest((found, eu.surgery_info(nnx.as_pure(optimizer.opt_state))), expected)


def plain(inner, budget, settings):
    return eu.saddle_point(inner, budget, **settings)


def injected(_, budget, settings):
    """The learning rate of PLAIN, as a number in the state."""
    of_rate = lambda rate: plain(optax.sgd(rate, momentum=0.9), budget, settings)
    return optax.inject_hyperparams(of_rate, hyperparam_dtype=jnp.float64)(rate=0.05)


def accumulated(dtype):
    return lambda *given: optax.MultiSteps(plain(*given), 4, accumulator_dtype=dtype)


SETTINGS = {
    f"{name}, {inner}": lambda k, name=name, inner=inner: step_for_step(name, INNERS[inner], k)
    for name in constraints(1)
    for inner in (INNERS if name == "budget" else ["clipped momentum"])
} | {
    "MultiSteps(4), sums in float32": lambda k: wrapped(accumulated(jnp.float32), k, parts=4),
    "MultiSteps(4), sums in float64": lambda k: wrapped(accumulated(jnp.float64), k, parts=4),
    "optax.chain": lambda k: wrapped(lambda *given: optax.chain(plain(*given)), k),
    "inject_hyperparams": lambda k: wrapped(injected, k, inner=PLAIN),
    "donated buffers": lambda k: wrapped(plain, k, donated=True),
    "stored and restored half-way": lambda k: wrapped(plain, k, stored=True),
    "bfloat16 parameters, float32 weights": lambda k: wrapped(plain, k, cast=jnp.bfloat16),
    "NNX module": nnx_module,
}
"""Setting -> the largest absolute difference, of K utilities."""


def main() -> None:
    print("| setting | K = 1 | K = 3 |\n|---|--:|--:|")
    for name, measure in SETTINGS.items():
        print(f"| {name} |", " | ".join(f"{measure(k):.0e}" for k in (1, 3)), "|", flush=True)


if __name__ == "__main__":
    main()
