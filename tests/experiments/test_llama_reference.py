"""The decoders against transformers and PEFT (extra "reference"), whose imports alone take long."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.language.fetch import model_path
from experiments.shared.models.llama import files, hugging_face, peft, tokens
from experiments.shared.models.llama.config import ATTENTION, FEED_FORWARD
from experiments.shared.models.llama.generate import generate, padded
from experiments.shared.models.llama.model import logits
from experiments.shared.models.lora import Adapter
from tests.llamas import FAMILIES, random_params, random_tokens, random_weights

pytestmark = pytest.mark.slow
STEPS = 24


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    # torch warns about itself while it is imported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def loaded(transformers, folder, dtype="float32"):
    """transformers' model, after a check that every tensor of the file found its place."""
    import torch

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=getattr(torch, dtype), output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, transformers, tmp_path):
    config = FAMILIES[family]
    params, ids = random_params(config), random_tokens(config, 2, STEPS)
    files.save(tmp_path / "ours", config, params)
    model = loaded(transformers, tmp_path / "ours")
    expected = their_logits(model, ids)
    found = np.asarray(logits(config, params, ids))
    print(family, "max difference", np.abs(found - expected).max(), "of", np.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-4)

    # What transformers writes, in its own names and fields, is the same model.
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / hugging_face.INDEX).exists()
    again = files.load(tmp_path / "theirs")
    np.testing.assert_array_equal(logits(again.config, again.params, ids), found)
    # And that goes back with the fields it came with.
    files.save(tmp_path / "back", again.config, again.params, like=tmp_path / "theirs")
    np.testing.assert_array_equal(their_logits(loaded(transformers, tmp_path / "back"), ids), expected)


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_is_as_near_to_float32_as_theirs(transformers, tmp_path):
    config = FAMILIES["Llama 3"]
    params, ids = random_params(config, jnp.bfloat16), random_tokens(config, 2, STEPS)
    files.save(tmp_path / "ours", config, params)
    theirs = their_logits(loaded(transformers, tmp_path / "ours", "bfloat16"), ids)
    exact = their_logits(loaded(transformers, tmp_path / "ours"), ids)
    ours = np.asarray(logits(config, params, ids))
    assert np.abs(ours - exact).mean() < 1.2 * np.abs(theirs - exact).mean()


@pytest.mark.filterwarnings("ignore")
def test_greedy_is_that_of_transformers(transformers, tmp_path):
    import torch

    config = FAMILIES["Qwen3"]
    params = random_params(config)
    files.save(tmp_path / "ours", config, params)
    model = loaded(transformers, tmp_path / "ours")
    for seed in range(3):
        prompt = random_tokens(config, 5, seed=seed).tolist()
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 5:].tolist()
        ours = generate(config, params, padded([prompt]), 12, config.eos_token_ids).tokens[0].tolist()
        assert ours[: len(theirs)] == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaled_by", ["rank", "root"])
def test_adapters_are_those_of_peft(scaled_by, transformers, tmp_path):
    library = pytest.importorskip("peft")
    import torch

    config = FAMILIES["Qwen2"]
    params, ids = random_params(config), random_tokens(config, 2, STEPS)
    files.save(tmp_path / "base", config, params)
    adapter = Adapter(1.7, random_weights(config, (*ATTENTION, *FEED_FORWARD)))
    peft.save_adapter(tmp_path / "ours", adapter, "base")
    model = library.PeftModel.from_pretrained(loaded(transformers, tmp_path / "base"), tmp_path / "ours")
    found = logits(config, params, ids, [adapter])
    np.testing.assert_allclose(found, their_logits(model, ids), atol=1e-4)

    # And theirs by us, with defaults and names of PEFT's choice.
    settings = library.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=scaled_by == "root"
    )
    model = library.get_peft_model(loaded(transformers, tmp_path / "base"), settings)
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(tmp_path / "theirs")
    adapter = peft.load_adapter(tmp_path / "theirs", config)
    assert adapter.scale == (3.0 if scaled_by == "root" else 1.5)
    found = logits(config, params, ids, [adapter])
    np.testing.assert_allclose(found, their_logits(model.eval(), ids), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_smollm2_is_that_of_transformers(transformers, tmp_path):
    """Their reader of GGUF, their tokenizer, their chat; of what experiments.language.fetch left."""
    path = model_path()
    if not path.exists():
        pytest.skip(f"{path} was not fetched")
    config, params = files.load(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = files.load_tokenizer(path)
    messages = [{"role": "user", "content": "Who are  you?"}]
    chat = tokens.chatml(messages)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat
    for text in (chat, "In 2024 it had 2,102,650 people.\n\n\tdef f(x): # naïve café 你好 🙂 don't I'LL"):
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == text
        found = np.asarray(jax.jit(logits, static_argnums=0)(config, params, np.array([ids])))
        np.testing.assert_allclose(found, their_logits(model.eval(), [ids]), atol=1e-3)

    files.save(tmp_path / "model", config, params, like=path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.eos_token == "<|im_end|>"
    assert again.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat
    assert again(chat)["input_ids"] == ours.encode(chat).ids
