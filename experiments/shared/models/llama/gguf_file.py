"""GGUF files of the same models, dequantised by the package `gguf`, under Hugging Face's names."""

import dataclasses
import pathlib
from typing import Any

import gguf
import numpy as np

from experiments.shared.models.llama.config import FAMILIES, Config, RopeScaling
from experiments.shared.models.llama.rope import frequencies
from experiments.shared.models.llama.weights import Tensors

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# One array for all layers: what each frequency of Llama 3 is divided by.
ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: pathlib.Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    # What the reader raises for a damaged file depends on where it was cut.
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"{path}: not a whole GGUF file: {error}") from error


def field(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    """A metadata field; ValueError where it is missing and has no default."""
    found = reader.fields.get(name)
    if found is None and default is None:
        raise ValueError(f"the field {name} is missing")
    return default if found is None else found.contents()


def read_config(reader: gguf.GGUFReader) -> Config:
    family = field(reader, "general.architecture")
    if family not in FAMILIES:
        raise ValueError(f"general.architecture {family!r} is not supported, only {', '.join(FAMILIES)}")
    refuse_unsupported(reader, family)
    own = lambda name, default=None: field(reader, f"{family}.{name}", default)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads, size = own("attention.head_count"), own("embedding_length")
    width = own("attention.key_length", size // heads)
    stop = reader.fields.get("tokenizer.ggml.eos_token_id")
    start = reader.fields.get("tokenizer.ggml.bos_token_id")
    config = Config(
        vocab_size=int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
        hidden_size=size,
        intermediate_size=own("feed_forward_length"),
        num_hidden_layers=own("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=own("attention.head_count_kv", heads),
        head_dim=width,
        rope_theta=own("rope.freq_base", 10_000.0),
        # It is stored in float32: 1e-5 as 9.99999974e-6.
        rms_norm_eps=float(f"{own('attention.layer_norm_rms_epsilon'):.6g}"),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        max_position_embeddings=own("context_length"),
        bos_token_id=None if start is None else start.contents(),
        eos_token_ids=() if stop is None else (stop.contents(),),
    )
    if ROPE_FACTORS not in tensors:
        return config
    scaled = with_llama3_scaling(config, float(tensors[ROPE_FACTORS].data.max()))
    expected = frequencies(config) / frequencies(scaled)
    if not np.allclose(tensors[ROPE_FACTORS].data, expected, rtol=1e-3):
        raise ValueError(f"{ROPE_FACTORS} is not the scaling of Llama 3.1 to 3.3")
    return scaled


def with_llama3_scaling(config: Config, factor: float) -> Config:
    """With the settings of Llama 3.1 to 3.3, of which a GGUF file keeps only what they lead to."""
    return dataclasses.replace(config, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192))


def refuse_unsupported(reader: gguf.GGUFReader, family: str) -> None:
    own = lambda name, default: field(reader, f"{family}.{name}", default)
    width = own("attention.key_length", own("embedding_length", 0) // own("attention.head_count", 1))
    allowed = {
        "rope.scaling.type": "none",
        "expert_count": 0,
        "attention.sliding_window": 0,
        "rope.dimension_count": width,
        "attention.value_length": width,
    }
    for name, value in allowed.items():
        if (found := own(name, value)) != value:
            raise ValueError(f"{family}.{name} = {found!r} is not supported, only {value!r}")


def read_tensors(reader: gguf.GGUFReader, config: Config) -> Tensors:
    family = field(reader, "general.architecture")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        stem, _, suffix = tensor.name.rpartition(".")
        if stem in TOP:
            found[f"{TOP[stem]}.{suffix}"] = tensor, None
        else:
            _, layer, kind = stem.split(".") if stem.count(".") == 2 else ("", "", stem)
            name = f"model.layers.{layer}.{LAYER.get(kind, kind)}.{suffix}"
            found[name] = tensor, heads.get(kind) if family == "llama" else None

    def read(name):
        tensor, permuted = found[name]
        try:
            value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError:
            raise ValueError(f"{tensor.name}: gguf cannot read {tensor.tensor_type.name}") from None
        return value if permuted is None else unpermuted(value, permuted)

    shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, (tensor, _) in found.items()}
    return Tensors(shapes, read)


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, or their bias, as Hugging Face orders them.

    Files of the architecture "llama" pair (2i, 2i + 1) for the rotation, Hugging Face (i, i + D/2). Those of
    the other families are as Hugging Face's.
    """
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)
