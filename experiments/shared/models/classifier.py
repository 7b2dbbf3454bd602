"""The classifiers of the studies: an MLP, a small CNN, and ResNets, as pure functions."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.shared.models.convolution import convolution
from experiments.shared.models.resnet import ResNet


class MLP(nn.Module):
    """Two hidden layers; images in, logits out."""

    classes: int
    widths: tuple[int, ...] = (256, 128)

    @nn.compact
    def __call__(self, x, train: bool):
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    """Two strided convolutions and a residual one between group normalisations, then the mean over pixels."""

    classes: int
    width: int = 32

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(nn.Conv, use_bias=False, conv_general_dilated=convolution)
        for width in (self.width, 2 * self.width):
            x = conv(width, (3, 3), 2)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        y = conv(2 * self.width, (3, 3))(x)
        x = nn.relu(x + nn.GroupNorm(num_groups=8)(y))
        return nn.Dense(self.classes)(x.mean((1, 2)))


# A ResNet that two cores train in minutes: 78,000 parameters.
ResNet8 = partial(ResNet, width=16, stages=(1, 1, 1), stem_stride=2, as_matmuls=True)
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet8": partial(ResNet8, norm="group"),
    "resnet8-batch": partial(ResNet8, norm="batch"),
    "resnet18": ResNet,
}
"""By name: (classes) -> a module of images [n, height, width, channels] in [0, 1]."""


class Classifier(NamedTuple):
    """A model as pure functions.

    Estimating the statistics of batch normalisation when they are needed, as for stochastic weight
    averaging, leaves nothing for an unlearning method to carry.

    Attributes:
      init: (key, x) -> params.
      apply: (params, x) -> logits [n, classes], normalised by the batch's own statistics.
      predict: (params, calibration, x) -> probabilities [n, classes], normalised by the mean statistics
        over the batches of `calibration` [k, batch, ...].
    """

    init: Callable[[jax.Array, Any], Any]
    apply: Callable[[Any, Any], jax.Array]
    predict: Callable[[Any, Any, Any], jax.Array]


def make_classifier(model: nn.Module) -> Classifier:
    def forward(params, x):
        logits, state = model.apply({"params": params}, x / 255, train=True, mutable=["batch_stats"])
        return jnp.asarray(logits), state

    def predict(params, calibration, x):
        statistics = jax.lax.map(lambda batch: forward(params, batch)[1], calibration)
        variables = {"params": params} | jax.tree.map(lambda leaf: leaf.mean(0), statistics)
        logits = lambda x: jnp.asarray(model.apply(variables, x[None] / 255, train=False))[0]
        return jax.nn.softmax(jax.lax.map(logits, x, batch_size=min(len(x), 1000)))

    init = lambda key, x: model.init(key, x / 255, train=False)["params"]
    return Classifier(init, lambda params, x: forward(params, x)[0], predict)


def calibration(images: jax.Array, rows: Any) -> jax.Array:
    """Images of those rows, or of the first 5,000, in batches [k, 250, ...]; the last is filled up."""
    batches = min(20, -(-len(rows) // 250))
    return images[jnp.resize(rows, (batches, 250))]


def output_bias(params: dict[str, Any]) -> Any:
    """The bias of the output layer, the last of the dense layers at the top; of any tree like params."""
    number = lambda layer: int(layer.removeprefix("Dense_"))
    return params[max((layer for layer in params if layer.startswith("Dense_")), key=number)]["bias"]
