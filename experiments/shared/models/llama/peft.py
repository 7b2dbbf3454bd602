"""Adapters in the files of PEFT: adapter_config.json and adapter_model.safetensors."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from experiments.shared.models.llama.config import ATTENTION, Config, projection_shapes
from experiments.shared.models.llama.hugging_face import open_files, read_json
from experiments.shared.models.lora import Adapter, LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT may write, and the only value for which B A times lora_alpha / r is all there is.
REQUIRED = {"peft_type": "LORA"}
ALLOWED = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}


def tensor_name(layer: int, projection: str, half: str) -> str:
    room = "self_attn" if projection in ATTENTION else "mlp"
    return f"base_model.model.model.layers.{layer}.{room}.{projection}.{half}.weight"


def save_adapter(folder: pathlib.Path, adapter: Adapter, base: str = "") -> None:
    """Writes both files; `base` is the name or folder of the model that it belongs to."""
    ranks = {weights.down.shape[1] for weights in adapter.weights.values()}
    if len(ranks) != 1:
        raise ValueError(f"PEFT's files hold one rank for all projections, got {sorted(ranks)}")
    (rank,) = ranks
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": float(adapter.scale) * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapter.weights),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    tensors = {}
    for projection, weights in adapter.weights.items():
        for half, stacked in (("lora_A", weights.down), ("lora_B", weights.up)):
            for layer, value in enumerate(np.asarray(stacked)):
                tensors[tensor_name(layer, projection, half)] = np.ascontiguousarray(value)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(raw, indent=2))


def load_adapter(folder: pathlib.Path, config: Config) -> Adapter:
    """The adapter in a folder, for a model of that config.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged, or says what is more than LoRA on the
        projections of every layer. The message names the file and the field or tensor.
    """
    path = folder / CONFIG
    raw = read_json(path)
    for field, value in (REQUIRED | ALLOWED).items():
        found = raw.get(field, None if field in REQUIRED else value)
        if found != value and (found or field in REQUIRED):
            raise ValueError(f"{path}: {field} = {found!r} is not supported, only {value!r}")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ValueError(f"{path}: r and lora_alpha must be numbers, got {rank!r} and {alpha!r}")
    scale = alpha / (rank**0.5 if raw.get("use_rslora") else rank)
    return Adapter(scale, read_weights(folder / WEIGHTS, config, rank))


def read_weights(path: pathlib.Path, config: Config, rank: int) -> Mapping[str, LowRank]:
    tensors, shapes = open_files([path]), projection_shapes(config)
    names = {
        n for name in tensors.shapes if (n := re.sub(r".*\.(\w+)\.lora_[AB]\.weight$", r"\1", name)) in shapes
    }
    expected = {}
    for name in names:
        outputs, inputs = shapes[name]
        for layer in range(config.num_hidden_layers):
            expected[tensor_name(layer, name, "lora_A")] = rank, inputs
            expected[tensor_name(layer, name, "lora_B")] = outputs, rank
    found: dict[str, Any] = dict(tensors.shapes)
    if wrong := sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    ):
        name = wrong[0]
        raise ValueError(
            f"{path}: {name} has shape {found.get(name, 'none: it is missing')}, "
            f"expected {expected.get(name, 'no such tensor')}"
        )
    stacked = lambda name, half: jnp.asarray(
        np.stack([tensors.read(tensor_name(i, name, half)) for i in range(config.num_hidden_layers)])
    )
    return {name: LowRank(stacked(name, "lora_A"), stacked(name, "lora_B")) for name in sorted(names)}
