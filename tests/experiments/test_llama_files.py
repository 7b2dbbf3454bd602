"""Files of decoders: Hugging Face's folders, GGUF, PEFT's adapters, tokenizers; round trips and damage."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from experiments.shared.models.llama import files, hugging_face, peft, tokens
from experiments.shared.models.llama.config import RopeScaling, from_hugging_face, to_hugging_face
from experiments.shared.models.llama.rope import frequencies
from experiments.shared.models.llama.weights import disassembled
from experiments.shared.models.lora import Adapter
from tests.llamas import FAMILIES, PLAIN, random_params, random_weights
from tests.representatives import slow_unless


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, expected)


def change(path, **fields):
    """Changes fields of a JSON file; ... removes one."""
    raw = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


# Hugging Face


@pytest.mark.parametrize("family", FAMILIES)
def test_config_there_and_back(family):
    raw = json.loads(json.dumps(to_hugging_face(FAMILIES[family])))
    assert from_hugging_face(raw) == FAMILIES[family]


def test_a_config_that_no_family_has_is_refused():
    with pytest.raises(ValueError, match="no model of the families"):
        to_hugging_face(dataclasses.replace(PLAIN, qk_norm=True, mlp_bias=True))


def test_defaults_are_those_of_the_family():
    raw = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 24,
        "intermediate_size": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    }
    config = from_hugging_face(raw)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (3, 8, 10_000.0)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.qkv_bias) == (1e-6, False, False)
    raw |= {"num_key_value_heads": 1, "model_type": "qwen2"}
    config = from_hugging_face(raw)
    assert (config.qkv_bias, config.o_bias, config.head_dim) == (True, False, 8)
    config = from_hugging_face(raw | {"model_type": "qwen3"})
    assert (config.qk_norm, config.qkv_bias, config.head_dim) == (True, False, 128)
    with pytest.raises(ValueError, match="num_key_value_heads"):
        from_hugging_face(raw | {"num_key_value_heads": None})


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_rope_theta_of_either_generation(fields):
    raw = {name: v for name, v in to_hugging_face(PLAIN).items() if not name.startswith("rope")}
    assert from_hugging_face(raw | fields) == dataclasses.replace(PLAIN, rope_theta=5e5)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_of_either_generation(name, kind):
    scaling = dataclasses.asdict(FAMILIES["Llama 3"].rope_scaling)
    raw = to_hugging_face(PLAIN) | {name: {kind: "llama3", "rope_theta": 7.0, **scaling}}
    found = from_hugging_face(raw)
    assert (found.rope_theta, found.rope_scaling) == (7.0, FAMILIES["Llama 3"].rope_scaling)
    del raw[name]["low_freq_factor"]
    with pytest.raises(ValueError, match=f"{name} .*low_freq_factor"):
        from_hugging_face(raw)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act .*gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters.rope_type 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq"),
        ({"auto_map": {"AutoModel": "own.py"}}, "auto_map"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number, got '32'"),
        ({"num_hidden_layers": ...}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
)
def test_what_the_model_lacks_is_refused_by_its_field(fields, said, tmp_path):
    files.save(tmp_path / "model", PLAIN, random_params(PLAIN))
    change(tmp_path / "model" / "config.json", **fields)
    with pytest.raises(ValueError, match=rf"config.json: .*{said}"):
        files.load(tmp_path / "model")


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"layer_types": ["full_attention"] * 3, "transformers.js_config": {"kv": 1}, "pretraining_tp": 1},
    ],
)
def test_what_changes_nothing_is_not_refused(fields):
    assert from_hugging_face(to_hugging_face(PLAIN) | fields) == PLAIN


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 9_000])
@pytest.mark.parametrize("dtype", slow_unless([jnp.bfloat16], [jnp.float32, jnp.bfloat16, jnp.float16]))
def test_a_folder_there_and_back(dtype, shard_bytes, tmp_path):
    config = FAMILIES["biases"]
    params = random_params(config, dtype)
    files.save(tmp_path / "model", config, params, shard_bytes=shard_bytes)
    found = files.load(tmp_path / "model")
    assert found.config == config
    assert_same(found.params, params)
    assert (
        json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == jnp.dtype(dtype).name
    )
    assert not (tmp_path / "model.partial").exists()
    parts = sorted((tmp_path / "model").glob("*.safetensors"))
    assert (len(parts) > 1) == (shard_bytes < 1_000_000)
    assert parts[0].name == (
        "model.safetensors" if len(parts) == 1 else f"model-00001-of-{len(parts):05}.safetensors"
    )
    held = {name for part in parts for name in load_file(part)}
    assert "model.layers.2.self_attn.q_proj.bias" in held
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= held
    if len(parts) > 1:
        assert all(part.stat().st_size < 11_000 for part in parts)
        index = json.loads((tmp_path / "model" / hugging_face.INDEX).read_text())
        assert index["weight_map"].keys() == held
        assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_a_folder_goes_back_with_all_that_lay_in_it(tmp_path):
    config, source = FAMILIES["SmolLM2"], tmp_path / "source"
    files.save(source, config, random_params(config))
    change(source / "config.json", someone="else's", dtype="float64", torch_dtype=...)
    (source / "LICENSE").write_text("yours")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("old weights")
    params = random_params(config, jnp.bfloat16, seed=7)
    files.save(tmp_path / "model", config, params, like=source)
    assert_same(files.load(tmp_path / "model").params, params)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["someone"] == "else's"
    assert (raw["torch_dtype"], "dtype" in raw) == ("bfloat16", False)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "LICENSE", "tokenizer.json", "model.safetensors"}
    with pytest.raises(ValueError, match="another shape"):
        files.save(tmp_path / "other", PLAIN, random_params(PLAIN), like=source)


def test_nothing_is_overwritten(tmp_path):
    files.save(tmp_path, PLAIN, params := random_params(PLAIN))
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        files.save(tmp_path, PLAIN, random_params(PLAIN, seed=1))
    assert_same(files.load(tmp_path).params, params)


def test_loaded_in_another_dtype_and_on_a_mesh(tmp_path):
    config = dataclasses.replace(PLAIN, vocab_size=64)
    files.save(tmp_path / "model", config, params := random_params(config))
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    found = files.load(tmp_path / "model", jnp.bfloat16, mesh).params
    assert_same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    query = found["layers"]["self_attn"]["q_proj"]["weight"]
    assert query.sharding.spec == P(None, "tensor", "fsdp")
    assert query.addressable_shards[0].data.shape == (3, 8, 16)


def weights_of(folder):
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json: not a JSON file"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json: a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ValueError, "model.safetensors: not a whole"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
            ValueError,
            "model.safetensors: not a whole",
        ),
    ],
)
def test_damaged_folders(damage, error, said, tmp_path):
    files.save(tmp_path, PLAIN, random_params(PLAIN))
    damage(tmp_path)
    with pytest.raises(error, match=said):
        files.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            "1 tensors are missing, such as model.layers.1.mlp.up_proj",
        ),
        ({"model.layers.3.mlp.up_proj.weight": np.ones(1)}, "no place in this model.*layers.3.mlp"),
        ({"model.norm.weight": np.ones(31, np.float32)}, r"model.norm.weight has shape \[31\].*\[32\]"),
        ({"model.norm.weight": np.ones(32, np.int8)}, "model.norm.weight has dtype int8"),
        ({"lm_head.weight": np.zeros((61, 32), np.float32)}, "tie_word_embeddings is true"),
    ],
)
def test_tensors_that_do_not_fit(changes, said, tmp_path):
    config = FAMILIES["SmolLM2"]
    files.save(tmp_path, config, random_params(config))
    changed = {n: v for n, v in (weights_of(tmp_path) | changes).items() if v is not None}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said) as caught:
        files.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_old_files_with_frequencies_and_a_copied_head(tmp_path):
    config = FAMILIES["SmolLM2"]
    files.save(tmp_path, config, params := random_params(config))
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    held = weights_of(tmp_path)
    save_file(
        held | more | {"lm_head.weight": held["model.embed_tokens.weight"]}, tmp_path / "model.safetensors"
    )
    assert_same(files.load(tmp_path).params, params)


def test_damaged_shards(tmp_path):
    files.save(tmp_path, PLAIN, random_params(PLAIN), shard_bytes=20_000)
    part = sorted(tmp_path.glob("*.safetensors"))[1]
    part.unlink()
    with pytest.raises(FileNotFoundError, match=part.name):
        files.load(tmp_path)
    change(tmp_path / hugging_face.INDEX, weight_map=...)
    with pytest.raises(ValueError, match=r"index.json: weight_map"):
        files.load(tmp_path)


# GGUF

WORDS = [*"abcdefghij", "ab", "Ġ", "Ġa", "<|end|>", *"0123456789"]
TYPES = gguf.GGMLQuantizationType


def write_gguf(path, config, params, family="llama", kind=TYPES.F32, fields=(), leave_out=(), factors=None):
    """A file as llama.cpp's converter makes them, with q and k of the family "llama" permuted by its rule."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word == "<|end|>" else 1 for word in WORDS])
    writer.add_token_merges(["a b", "Ġ a"])
    for name, value in fields:
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    name_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers).get_name
    for name, value in disassembled(params):
        target = name_of(name, (".weight", ".bias"))
        assert target, name
        if target in leave_out:
            continue
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        matrix = value.ndim == 2
        data = gguf.quantize(np.asarray(value, np.float32), kind if matrix else TYPES.F32)
        writer.add_tensor(target, data, raw_dtype=kind if matrix else TYPES.F32)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["SmolLM2", "biases", "Qwen2", "Qwen3"])
def test_gguf_is_the_same_model(family, tmp_path):
    config = FAMILIES[family]
    params = random_params(config)
    architecture = family.lower() if family.startswith("Qwen") else "llama"
    found = files.load(write_gguf(tmp_path / "m.gguf", config, params, architecture))
    assert found.config == config
    assert_same(found.params, params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_quantised(kind, tmp_path):
    config = dataclasses.replace(PLAIN, intermediate_size=64, head_dim=16)
    params = random_params(config)
    found = files.load(write_gguf(tmp_path / "m.gguf", config, params, kind=TYPES[kind])).params
    matrix = params["layers"]["mlp"]["down_proj"]["weight"]
    error = np.abs(found["layers"]["mlp"]["down_proj"]["weight"] - matrix)
    scale = np.abs(matrix).max()
    bound = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.51 / 127, "Q4_0": 1.01 / 8, "Q4_1": 0.51 * 2 / 15}[kind]
    assert 0 < error.max() < bound * scale
    norms = [p["layers"]["input_layernorm"]["weight"] for p in (found, params)]
    np.testing.assert_array_equal(*norms)


def q4_0(scale, nibbles):
    """A block of 32 weights: a float16, then 16 bytes whose low nibbles come first."""
    low, high = nibbles[:16], nibbles[16:]
    return np.float16(scale).tobytes() + bytes(a | b << 4 for a, b in zip(low, high, strict=True))


def test_q4_0_by_hand():
    """The layout itself, so that a writer and a reader that err alike are found out."""
    nibbles = [i % 16 for i in range(16)] + [15 - i for i in range(16)]
    block = np.frombuffer(q4_0(0.5, nibbles), np.uint8)[None]
    assert gguf.dequantize(block, TYPES.Q4_0)[0].tolist() == [0.5 * (n - 8) for n in nibbles]


def test_gguf_of_llama_3(tmp_path):
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    plain = dataclasses.replace(PLAIN, head_dim=16, rope_theta=5e5)
    config = dataclasses.replace(plain, rope_scaling=scaling)
    params = random_params(config)
    factors = frequencies(plain) / frequencies(config)
    assert files.load(write_gguf(tmp_path / "m.gguf", config, params, factors=factors)).config == config
    other = dataclasses.replace(config, rope_scaling=RopeScaling(32.0, 1.0, 2.0, 8192))
    factors = frequencies(plain) / frequencies(other)
    with pytest.raises(ValueError, match="rope_freqs"):
        files.load(write_gguf(tmp_path / "n.gguf", config, params, factors=factors))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fields": [("llama.rope.scaling.type", "yarn")]}, "llama.rope.scaling.type = 'yarn'"),
        ({"fields": [("llama.expert_count", 4)]}, "llama.expert_count = 4"),
        ({"fields": [("llama.rope.dimension_count", 4)]}, "llama.rope.dimension_count = 4"),
        ({"leave_out": ["blk.1.ffn_up.weight"]}, "missing, such as model.layers.1.mlp.up_proj.weight"),
        ({"leave_out": ["token_embd.weight"]}, "model.embed_tokens.weight"),
    ],
)
def test_gguf_that_does_not_fit(options, said, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", PLAIN, random_params(PLAIN), **options)
    with pytest.raises(ValueError, match=rf"m.gguf: .*{said}"):
        files.load(path)


def test_gguf_of_another_family(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general.architecture 'gemma'"):
        files.load(tmp_path / "m.gguf")


def test_damaged_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(FileNotFoundError, match=r"m.gguf"):
        files.load(path)
    whole = write_gguf(path, PLAIN, random_params(PLAIN)).read_bytes()
    for size in (0, 10, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m.gguf: not a whole GGUF file"):
            files.load(path)


def test_gguf_to_a_folder(tmp_path):
    config = FAMILIES["SmolLM2"]
    path = write_gguf(tmp_path / "m.gguf", config, params := random_params(config))
    files.save(tmp_path / "model", config, params, like=path)
    assert_same(files.load(tmp_path / "model"), files.load(path))
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("b", "c")
    text = "ab a0<|end|>"
    ids = [files.load_tokenizer(source).encode(text).ids for source in (path, tmp_path / "model")]
    assert ids[0] == ids[1] == [WORDS.index(word) for word in ("ab", "Ġa", "0", "<|end|>")]


# Tokenizers


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        # Digits one by one, and a space for itself before one.
        ("smollm", ["Ġa", "Ġ", "1", "2", "3", "4"]),
        # Digits in threes: nothing joins them here, but the space stays with none of them.
        ("llama-bpe", ["<|end|>", "Ġa", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["Ġa", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_gguf_tokenizers(pre, words, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_bos_token_id(WORDS.index("<|end|>"))
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word == "<|end|>" else 1 for word in WORDS])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = files.load_tokenizer(tmp_path / "m.gguf")
    found = tokenizer.encode(" a 1234")
    assert found.tokens == words
    assert tokenizer.decode(found.ids) == " a 1234"


def test_unknown_gguf_tokenizers_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", PLAIN, random_params(PLAIN))
    path.write_bytes(path.read_bytes().replace(b"smollm", b"falcon"))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre 'falcon'.*tokenizer.json"):
        files.load_tokenizer(path)


def test_tokenizer_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        files.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        files.load_tokenizer(tmp_path)
    Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(tmp_path / "tokenizer.json"))
    assert files.load_tokenizer(tmp_path).encode("aba").ids == [2, 0]


def test_a_chat():
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    user = "<|im_start|>user\nWho?<|im_end|>\n"
    start = "<|im_start|>assistant\n"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert tokens.chatml(messages) == system + user + start
    assert tokens.chatml(messages[1:]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM,"
    )
    assert tokens.chatml(messages[1:]).endswith("<|im_end|>\n" + user + start)


# Adapters


def test_an_adapter_there_and_back(tmp_path):
    adapter = Adapter(0.75, random_weights(PLAIN, ["q_proj", "down_proj"]))
    peft.save_adapter(tmp_path, adapter, "some/model")
    found = peft.load_adapter(tmp_path, PLAIN)
    assert found.scale == 0.75
    assert_same(dict(found.weights), dict(adapter.weights))
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["target_modules"]) == (3, 2.25, ["down_proj", "q_proj"])
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert held["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"].shape == (32, 3)
    change(tmp_path / "adapter_config.json", use_rslora=True)
    assert peft.load_adapter(tmp_path, PLAIN).scale == pytest.approx(2.25 / 3**0.5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"peft_type": ...}, "peft_type = None"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"r": None}, "r and lora_alpha must be numbers, got None"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(fields, said, tmp_path):
    peft.save_adapter(tmp_path, Adapter(1.0, random_weights(PLAIN, ["q_proj"])))
    change(tmp_path / "adapter_config.json", **fields)
    with pytest.raises(ValueError, match=rf"adapter_config.json: .*{said}"):
        peft.load_adapter(tmp_path, PLAIN)


def test_adapters_that_do_not_fit(tmp_path):
    peft.save_adapter(tmp_path, Adapter(1.0, random_weights(PLAIN, ["q_proj"])))
    other = dataclasses.replace(PLAIN, hidden_size=64)
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors: .*q_proj.lora_A.* \(3, 32\).*\(3, 64\)"
    ):
        peft.load_adapter(tmp_path, other)
    with pytest.raises(ValueError, match=r"layers.3.self_attn.q_proj.lora_A.weight .*missing"):
        peft.load_adapter(tmp_path, dataclasses.replace(PLAIN, num_hidden_layers=4))
    ranks = random_weights(PLAIN, ["q_proj"], 2) | random_weights(PLAIN, ["k_proj"], 3)
    with pytest.raises(ValueError, match="one rank"):
        peft.save_adapter(tmp_path / "other", Adapter(1.0, ranks))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors"):
        peft.load_adapter(tmp_path, PLAIN)
