"""The shape of a decoder, from and to Hugging Face's config.json; what is not supported is refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3")
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's longer wavelengths: those of many tokens are `factor` times as long, short ones stay."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and constants of a decoder, most under the names of config.json.

    Attributes:
      qkv_bias, o_bias, mlp_bias: biases of the projections q, k, v; of o; of gate, up, down.
      qk_norm: whether queries and keys are normalised within each head, as in Qwen3.
      eos_token_ids: tokens that end a text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")


def projection_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every projection."""
    size, hidden = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    pairs = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (queries, size),
        "k_proj": (pairs, size),
        "v_proj": (pairs, size),
        "o_proj": (size, queries),
        "gate_proj": (hidden, size),
        "up_proj": (hidden, size),
        "down_proj": (size, hidden),
    }


def from_hugging_face(raw: Mapping[str, Any]) -> Config:
    """The Config that a config.json says; ValueError that names the field for all that this model lacks."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
    refuse_unsupported(raw)
    biased = bool(raw.get("attention_bias", False))
    heads = required(raw, "num_attention_heads")
    # A missing num_key_value_heads means something else in each family and version, but for Llama.
    pairs = raw.get("num_key_value_heads") or (
        heads if family == "llama" else required(raw, "num_key_value_heads")
    )
    default_width = 128 if family == "qwen3" else required(raw, "hidden_size") // heads
    theta, scaling = rope(raw)
    stop = raw.get("eos_token_id")
    return Config(
        vocab_size=required(raw, "vocab_size"),
        hidden_size=required(raw, "hidden_size"),
        intermediate_size=required(raw, "intermediate_size"),
        num_hidden_layers=required(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        head_dim=raw.get("head_dim") or default_width,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=biased or family == "qwen2",
        o_bias=biased and family != "qwen2",
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,),
    )


def to_hugging_face(config: Config) -> dict[str, Any]:
    """The config.json of a model that came from elsewhere."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias > config.o_bias else "llama"
    own = ("qkv_bias", "o_bias", "qk_norm", "eos_token_ids", "rope_scaling", "mlp_bias")
    raw = {name: value for name, value in dataclasses.asdict(config).items() if name not in own}
    raw |= {
        "model_type": family,
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family] + "ForCausalLM"],
        "hidden_act": "silu",
        "eos_token_id": list(config.eos_token_ids) or None,
        "rope_scaling": config.rope_scaling
        and {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)},
    }
    if family != "qwen2":
        raw["attention_bias"] = config.o_bias
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if from_hugging_face(raw) != config:
        raise ValueError(f"no model of the families {', '.join(FAMILIES)} has this shape: {config}")
    return raw


def required(raw: Mapping[str, Any], field: str) -> int:
    if not isinstance(raw.get(field), int):
        raise ValueError(f"{field} must be a whole number, got {raw.get(field)!r}")
    return raw[field]


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """ValueError for a field that changes what the model computes in a way that this one does not."""
    layers = required(raw, "num_hidden_layers")
    window = raw.get("use_sliding_window", False) and raw.get("sliding_window", 4096) is not None
    slides = window and raw.get("max_window_layers", 28) < layers
    kinds = set(raw.get("layer_types") or ["full_attention"])
    act = raw.get("hidden_act", "silu")
    problems = {
        "hidden_act": act not in ("silu", "swish") and act,
        "use_sliding_window": slides and "true, with layers from max_window_layers on",
        "layer_types": kinds != {"full_attention"} and sorted(kinds),
        "pretraining_tp": (raw.get("pretraining_tp") or 1) != 1 and raw["pretraining_tp"],
        "partial_rotary_factor": (raw.get("partial_rotary_factor") or 1) != 1
        and raw["partial_rotary_factor"],
    }
    for field in ("quantization_config", "auto_map", "num_experts", "num_local_experts"):
        problems[field] = raw.get(field)
    for field, value in problems.items():
        if value:
            raise ValueError(f"{field} is not supported: {value}")


def rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling.

    transformers 5 writes both into rope_parameters; before, theta stood at the top and the scaling in
    rope_scaling. A file with both is read as transformers 5 reads it.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    found = raw.get(name) or {}
    theta = found.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    if (found.get("partial_rotary_factor") or 1) != 1:
        raise ValueError(f"{name}.partial_rotary_factor is not supported: {found['partial_rotary_factor']}")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"{name}.rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    fields = [field.name for field in dataclasses.fields(RopeScaling)]
    if missing := [field for field in fields if field not in found]:
        raise ValueError(f"{name} of type llama3 lacks {', '.join(missing)}")
    return float(theta), RopeScaling(**{field: found[field] for field in fields})
