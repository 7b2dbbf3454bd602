"""A small decoder of random weights and a tokenizer of bytes: the smoke test's model."""

import pathlib

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from experiments.shared.models.llama.config import Config
from experiments.shared.models.llama.files import save
from experiments.shared.models.llama.model import initial_params
from experiments.shared.models.llama.tokens import TOKENIZER

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = Config(
    vocab_size=len(SPECIAL) + 256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    eos_token_ids=(2,),
)


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, after the special ones."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    return tokenizer


def make(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """The model in Hugging Face's form, made unless it is there."""
    if not folder.exists():
        save(folder, CONFIG, initial_params(CONFIG, jax.random.key(seed)))
        byte_tokenizer().save(str(folder / TOKENIZER))
    return folder
