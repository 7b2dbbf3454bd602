"""Small decoders of every family, with weights that nothing hides in: no norm is 1, no bias 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.models.llama.config import Config, RopeScaling, projection_shapes
from experiments.shared.models.llama.model import param_shapes
from experiments.shared.models.lora import LowRank

PLAIN = Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-3,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_ids=(2,),
)
# 8 frequencies, of which the scaling keeps some, divides some and blends some.
LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
FAMILIES = {
    "llama": PLAIN,
    "SmolLM2": dataclasses.replace(PLAIN, tie_word_embeddings=True, rope_theta=1e5, num_key_value_heads=1),
    "Llama 3": dataclasses.replace(
        PLAIN, head_dim=16, rope_theta=500.0, rope_scaling=LLAMA3, eos_token_ids=(2, 5)
    ),
    "biases": dataclasses.replace(PLAIN, qkv_bias=True, o_bias=True, mlp_bias=True, num_key_value_heads=4),
    "Qwen2": dataclasses.replace(PLAIN, qkv_bias=True, rope_theta=1e6, rms_norm_eps=1e-2),
    "Qwen3": dataclasses.replace(PLAIN, qk_norm=True, head_dim=12, tie_word_embeddings=True, rope_theta=1e6),
    "Qwen3 with biases": dataclasses.replace(PLAIN, qk_norm=True, qkv_bias=True, o_bias=True, head_dim=16),
}


def random_params(config: Config, dtype=jnp.float32, seed: int = 0):
    """NumPy draws them: nothing is compiled."""
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        value = draw.normal(size=shape.shape)
        if len(path) > 1 and "norm" in path[-2].key:
            value = 1 + 0.3 * value
        else:
            value = value * (0.3 if path[-1].key == "bias" else shape.shape[-1] ** -0.5)
        return jnp.asarray(value.astype(dtype))

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(config))


def random_tokens(config: Config, *shape: int, seed: int = 2):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32))


def random_weights(config: Config, names, rank: int = 3, dtype=jnp.float32, seed: int = 3):
    draw = np.random.default_rng(seed)
    some = lambda *shape: jnp.asarray(0.3 * draw.normal(size=(config.num_hidden_layers, *shape)), dtype)
    shapes = projection_shapes(config)
    return {name: LowRank(some(rank, shapes[name][1]), some(shapes[name][0], rank)) for name in names}
