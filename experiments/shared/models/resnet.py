"""Residual networks for small images (He et al., arXiv 1512.03385)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn

from experiments.shared.models.convolution import convolution

Norm = Literal["batch", "group"]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    width: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), self.stride)(x)))
        y = self.norm()(self.conv(self.width, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A 3 x 3 stem, then blocks in stages, each of half the size and twice the width; ResNet-18 as it stands.

    Attributes:
      width: of the stem and the first stage.
      stages: blocks in each.
      stem_stride: 2 halves the image at once.
      norm: batch normalisation's statistics are the batch's own in training, and are not carried.
      as_matmuls: convolutions as slices and a matrix product, which CPUs run fast in loops.
    """

    classes: int
    width: int = 64
    stages: tuple[int, ...] = (2, 2, 2, 2)
    stem_stride: int = 1
    norm: Norm = "batch"
    as_matmuls: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        how = {"conv_general_dilated": convolution} if self.as_matmuls else {}
        conv = partial(nn.Conv, use_bias=False, **how)
        if self.norm == "group":
            norm = partial(nn.GroupNorm, num_groups=4)
        else:
            # Momentum 0: the statistics that come out are the batch's own.
            norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.0)
        x = nn.relu(norm()(conv(self.width, (3, 3), self.stem_stride)(x)))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = ResidualBlock(self.width * 2**stage, stride, conv, norm)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))
