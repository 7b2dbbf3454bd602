"""The models whose steps are measured: parameters, their losses, and batches of random data."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu
from eupmu_jax import objectives
from experiments.shared.models.convolution import convolution
from experiments.shared.models.llama.config import Config, projection_shapes
from experiments.shared.models.llama.model import Compute, initial_params, logits
from experiments.shared.models.lora import Adapter, initial_weights

Rows = dict[str, jax.Array]
"""Examples: arrays with a leading axis of rows."""

Outputs = Callable[[Any, Any, jax.Array], jax.Array]
"""(trained, frozen, x) -> logits [rows, ..., classes]."""


class Parts(NamedTuple):
    """A model's arrays; `frozen` is {} where all are trained."""

    trained: Any
    frozen: Any


class Model(NamedTuple):
    """A model, what it is trained on, and how long it is timed.

    Attributes:
      init: () -> Parts, the same whenever it is called.
      outputs: (trained, frozen, x) -> logits.
      batch: {"forget": Rows, "retain": Rows}, x and y of one step.
      inner: "sgd", with momentum, or "adamw".
      steps: so many make a block that is timed.
      kind: which function of `torch_models` computes the same.
      heads: of a decoder, those of queries, and those of keys and values.
      is_slow_to_compile: whether it is measured in the most important rows alone.
    """

    init: Callable[[], Parts]
    outputs: Outputs
    batch: dict[str, Rows]
    inner: str
    steps: int
    kind: str
    heads: tuple[int, int] = (1, 1)
    is_slow_to_compile: bool = False


INNER: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1e-4, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-6),
}
"""Rates so low that all methods stay where they are: what is measured is the same work."""


def count(tree: Any) -> int:
    """Numbers in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def losses_of(forget: jax.Array, retain: jax.Array, y: jax.Array, utilities: int = 1) -> eu.Losses:
    """KL to the uniform distribution of what is to be forgotten, cross-entropy of what is retained."""
    of_rows = objectives.cross_entropy(retain, y)
    means = of_rows.mean() if utilities == 1 else of_rows.reshape(utilities, -1).mean(1)
    return eu.Losses(objectives.kl_to_uniform(forget).mean(), means)


def in_two_passes(outputs: Outputs, utilities: int = 1) -> Callable[[Any, Any], eu.Losses]:
    """A pass for each kind of rows: a gradient of the forget loss does no work on what is retained.

    Several utilities are groups of retain rows, of one size, with a loss each.
    """

    def losses_fn(trained, batch):
        of = partial(outputs, trained, batch["frozen"])
        retain = batch["retain"]
        return losses_of(of(batch["forget"]["x"]), of(retain["x"]), retain["y"], utilities)

    return losses_fn


def in_one_pass(outputs: Outputs) -> Callable[[Any, Any], eu.Losses]:
    """One pass over all rows, which both losses share."""

    def losses_fn(trained, batch):
        forget, retain = batch["forget"], batch["retain"]
        both = outputs(trained, batch["frozen"], jnp.concatenate([forget["x"], retain["x"]]))
        of_forget, of_retain = jnp.split(both, [len(forget["x"])])
        return losses_of(of_forget, of_retain, retain["y"])

    return losses_fn


def rows(key: int, count: int, shape: tuple[int, ...], classes: int) -> Rows:
    """Normal inputs and random labels."""
    rng = np.random.default_rng(key)
    return {
        "x": jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32),
        "y": jnp.asarray(rng.integers(0, classes, count), jnp.int32),
    }


def texts(key: int, count: int, length: int, vocabulary: int) -> Rows:
    """Random tokens, and the token after each."""
    tokens = np.random.default_rng(key).integers(0, vocabulary, (count, length + 1))
    return {"x": jnp.asarray(tokens[:, :-1], jnp.int32), "y": jnp.asarray(tokens[:, 1:], jnp.int32)}


def mlp(widths: tuple[int, ...], batch_size: int, steps: int) -> Model:
    """Dense layers with ReLU between them."""

    def init() -> Parts:
        keys = jax.random.split(jax.random.key(0), len(widths) - 1)
        layers = zip(keys, widths[:-1], widths[1:], strict=True)
        made = [{"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)} for key, m, n in layers]
        return Parts(made, {})

    def outputs(trained, frozen, x):
        del frozen
        *hidden, last = trained
        for layer in hidden:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ last["w"] + last["b"]

    batch = {
        name: rows(key, batch_size, widths[:1], widths[-1]) for key, name in enumerate(("forget", "retain"))
    }
    return Model(init, outputs, batch, "sgd", steps, "mlp")


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, after He et al., arXiv 1512.03385, with GroupNorm."""

    width: int
    stride: int
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.GroupNorm, num_groups=4)
        y = nn.relu(norm()(self.conv(self.width, (3, 3), self.stride)(x)))
        y = norm()(self.conv(self.width, (3, 3))(y))
        if x.shape != y.shape:
            x = norm()(self.conv(self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18 for small images: a 3 x 3 stem, four stages of two blocks."""

    classes: int
    width: int
    stages: int
    as_matmuls: bool

    @nn.compact
    def __call__(self, x):
        how = {"conv_general_dilated": convolution} if self.as_matmuls else {}
        conv = partial(nn.Conv, use_bias=False, **how)
        x = nn.relu(nn.GroupNorm(num_groups=4)(conv(self.width, (3, 3))(x)))
        for stage in range(self.stages):
            for block in range(2):
                x = ResidualBlock(self.width * 2**stage, 2 if stage and not block else 1, conv)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def cnn(
    as_matmuls: bool, batch_size: int, steps: int, width: int = 8, stages: int = 4, size: int = 32
) -> Model:
    """A ResNet at CIFAR's shapes; its 3 x 3 convolutions by XLA, or as nine slices and a matrix product."""
    net = ResNet(10, width, stages, as_matmuls)
    shape = size, size, 3
    init = jax.jit(lambda: Parts(net.init(jax.random.key(0), jnp.zeros((1, *shape)))["params"], {}))
    outputs = lambda trained, frozen, x: jnp.asarray(net.apply({"params": trained}, x))
    batch = {name: rows(key, batch_size, shape, 10) for key, name in enumerate(("forget", "retain"))}
    return Model(init, outputs, batch, "sgd", steps, "cnn", is_slow_to_compile=True)


RANK, SCALE = 8, 2.0


def decoder(config: Config, lora: bool, batch_size: int, length: int, steps: int) -> Model:
    """A Llama, of which all parameters are trained, or low-rank adapters of its queries and values."""
    # Without a loop over the layers, in which cost analyses would count one layer alone.
    compute = Compute(unroll=True)

    def init() -> Parts:
        params = initial_params(config, jax.random.key(0))
        if not lora:
            return Parts(params, {})
        shapes, layers = projection_shapes(config), config.num_hidden_layers
        return Parts(initial_weights(shapes, layers, jax.random.key(1), RANK), params)

    def outputs(trained, frozen, tokens):
        adapters = [Adapter(SCALE, trained)] if lora else []
        return logits(config, frozen if lora else trained, tokens, adapters, compute)

    batch = {
        name: texts(key, batch_size, length, config.vocab_size)
        for key, name in enumerate(("forget", "retain"))
    }
    heads = config.num_attention_heads, config.num_key_value_heads
    return Model(init, outputs, batch, "adamw", steps, "llama", heads)


LLAMA = Config(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
SHORT_LLAMA = dataclasses.replace(LLAMA, num_hidden_layers=1, vocab_size=512)
"""Of which texts of any length are quick."""

TINY_LLAMA = Config(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)

MODELS: dict[str, Callable[[], Model]] = {
    "tiny MLP": lambda: mlp((20, 32, 2), 32, 200),
    "MLP": lambda: mlp((784, 1024, 1024, 10), 64, 10),
    "CNN": lambda: cnn(False, 16, 2),
    "CNN, matmuls": lambda: cnn(True, 16, 2),
    "Llama": lambda: decoder(LLAMA, False, 2, 128, 2),
    "Llama, LoRA": lambda: decoder(LLAMA, True, 2, 128, 2),
}
SMOKE: dict[str, Callable[[], Model]] = {"tiny MLP": lambda: mlp((20, 32, 2), 32, 20)}
