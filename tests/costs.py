"""Small models, steps of each kind, and what a compiled step costs: for tests that compare programs."""

import os

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxprs_in_params

import eupmu_jax as eu


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(batch_size=256, widths=(784, 256, 128, 10)):
    keys = jax.random.split(jax.random.key(0), len(widths) - 1)
    params = [
        {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]

    def loss(params, batch):
        x, labels = batch
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return cross_entropy(x @ params[-1]["w"] + params[-1]["b"], labels)

    part = (jnp.zeros((batch_size, widths[0])), jnp.zeros(batch_size, jnp.int32))
    return params, lambda p, b: eu.Losses(loss(p, b[0]), loss(p, b[1])), (part, part)


def transformer(width=128, depth=2, length=64, vocabulary=256, batch_size=8, heads=4):
    keys = iter(jax.random.split(jax.random.key(0), 2 + 6 * depth))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / shape[0] ** 0.5
    shapes = {name: (width, width) for name in "qkvo"} | {
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    params = {
        "embed": normal(vocabulary, width),
        "blocks": [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(depth)],
        "head": normal(width, vocabulary),
    }

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def loss(params, tokens):
        x = params["embed"][tokens]
        split = lambda y: y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        for block in params["blocks"]:
            h = normed(x)
            q, k, v = (split(h @ block[name]) for name in "qkv")
            scores = jnp.where(causal, q @ k.swapaxes(2, 3) / (width / heads) ** 0.5, -1e9)
            mixed = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(x.shape)
            x = x + mixed @ block["o"]
            x = x + jax.nn.gelu(normed(x) @ block["up"]) @ block["down"]
        return cross_entropy(normed(x) @ params["head"], tokens)

    tokens = jnp.zeros((batch_size, length), jnp.int32)
    return params, lambda p, b: eu.Losses(loss(p, b[0]), loss(p, b[1])), (tokens, tokens)


# What tests/conftest.py changes for speed, as users have it.
AS_USERS = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    AS_USERS["xla_cpu_use_fusion_emitters"] = True
INNER = {"momentum": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(1e-3)}


def linear_step(losses_fn, inner):
    def step(params, state, batch):
        def objective(params):
            losses = losses_fn(params, batch)
            return losses.forget + 0.5 * losses.retain, losses

        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state, losses

    return step


def eupmu_step(tx):
    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def implicit_step(surgery, tx, losses_fn):
    def step(params, state, batch):
        losses, grads = surgery.value_and_grad(losses_fn)(params, batch, state)
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    return step


def compile_step(step, *args, donate=(0, 1)):
    """A step that, as in training, takes its arguments over, compiled as users have it."""
    return jax.jit(step, donate_argnums=donate).lower(*args).compile(compiler_options=AS_USERS)


def cost(step, *args, donate=(0, 1)):
    """(FLOPs, bytes of temporaries) of such a step."""
    compiled = compile_step(step, *args, donate=donate)
    analysis = compiled.cost_analysis()
    return analysis["flops"], compiled.memory_analysis().temp_size_in_bytes


def count(jaxpr, name):
    """How often a primitive stands in a jaxpr, those inside its equations included."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for sub in jaxprs_in_params(equation.params):
            total += count(sub, name)
    return total
