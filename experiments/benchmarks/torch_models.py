"""The models of `models` in PyTorch, as functions of the same trees of parameters."""

# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from experiments.benchmarks.models import SCALE, Model

Tree = Any
"""A tree like the model's parameters, of tensors."""

Outputs = Callable[[Tree, Tree, torch.Tensor], torch.Tensor]
"""(trained, frozen, x) -> logits [rows, ..., classes]."""


def outputs_of(model: Model) -> Outputs:
    """What `model.outputs` computes."""
    if model.kind == "llama":
        heads, pairs = model.heads
        return lambda trained, frozen, x: decoder(trained, frozen, x, heads, pairs)
    return {"mlp": mlp, "cnn": cnn}[model.kind]


def mlp(trained: Tree, frozen: Tree, x: torch.Tensor) -> torch.Tensor:
    *hidden, last = trained
    for layer in hidden:
        x = F.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def in_order(tree: Tree, prefix: str) -> list[Tree]:
    """The layers of that name in flax's numbering."""
    names = [name for name in tree if name.startswith(prefix)]
    return [tree[name] for name in sorted(names, key=lambda name: int(name.rpartition("_")[2]))]


def conv(weights: Tree, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """A convolution padded as XLA's "SAME" is; the kernel [h, w, C, D] is turned once a step."""
    kernel = weights["kernel"].permute(3, 2, 0, 1)
    total = max(kernel.shape[-1] - stride, 0) if x.shape[-1] % stride == 0 else kernel.shape[-1] - 1
    low = total // 2
    if low == total - low:
        return F.conv2d(x, kernel, stride=stride, padding=low)
    return F.conv2d(F.pad(x, (low, total - low, low, total - low)), kernel, stride=stride)


def norm(weights: Tree, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, 4, weights["scale"], weights["bias"], 1e-6)


def residual_block(weights: Tree, x: torch.Tensor, stride: int) -> torch.Tensor:
    convs, norms = in_order(weights, "Conv_"), in_order(weights, "GroupNorm_")
    y = F.relu(norm(norms[0], conv(convs[0], x, stride)))
    y = norm(norms[1], conv(convs[1], y))
    if len(convs) == 3:
        x = norm(norms[2], conv(convs[2], x, stride))
    return F.relu(x + y)


def cnn(trained: Tree, frozen: Tree, x: torch.Tensor) -> torch.Tensor:
    # The layout in which PyTorch's convolutions are fast on a CPU: channels last, as the images come.
    x = x.permute(0, 3, 1, 2)
    x = F.relu(norm(trained["GroupNorm_0"], conv(trained["Conv_0"], x)))
    for i, weights in enumerate(in_order(trained, "ResidualBlock_")):
        x = residual_block(weights, x, 2 if i and i % 2 == 0 else 1)
    dense = trained["Dense_0"]
    return x.mean((2, 3)) @ dense["kernel"] + dense["bias"]


def rms_norm(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x [B, H, T, D], halves turned against each other, base 10,000."""
    length, width = x.shape[-2:]
    rates = 10_000.0 ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def decoder(trained: Tree, frozen: Tree, tokens: torch.Tensor, heads: int, pairs: int) -> torch.Tensor:
    """Llama; where parameters are frozen, the trained are low-rank adapters."""
    params, adapters = (frozen, trained) if frozen else (trained, {})
    layers = params["layers"]
    x = params["embed_tokens"]["weight"][tokens]
    for i in range(len(layers["input_layernorm"]["weight"])):

        def linear(part, name, x, i=i):
            y = x @ layers[part][name]["weight"][i].T
            if name in adapters:
                low_rank = adapters[name]
                y = y + SCALE * ((x @ low_rank.down[i].T) @ low_rank.up[i].T)
            return y

        h = rms_norm(layers["input_layernorm"]["weight"][i], x)
        split = lambda y, count: y.unflatten(-1, (count, -1)).transpose(1, 2)
        query = rotated(split(linear("self_attn", "q_proj", h), heads))
        key = rotated(split(linear("self_attn", "k_proj", h), pairs))
        value = split(linear("self_attn", "v_proj", h), pairs)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + linear("self_attn", "o_proj", mixed.transpose(1, 2).flatten(2))
        h = rms_norm(layers["post_attention_layernorm"]["weight"][i], x)
        gated = F.silu(linear("mlp", "gate_proj", h)) * linear("mlp", "up_proj", h)
        x = x + linear("mlp", "down_proj", gated)
    head = params.get("lm_head", params["embed_tokens"])["weight"]
    return rms_norm(params["norm"]["weight"], x) @ head.T
