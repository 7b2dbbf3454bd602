"""Texts to tokens: tokenizer.json, the fields of a GGUF file, and SmolLM2's form of a chat."""

import pathlib
from collections.abc import Iterable, Mapping

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from experiments.shared.models.llama.gguf_file import field

TOKENIZER = "tokenizer.json"
CONTROL, USER_DEFINED = 3, 4
# How texts are cut before the byte-level BPE, as in tokenizer.json of Llama 3 and Qwen2.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"llama-bpe": WORDS.replace("{DIGITS}", "{1,3}"), "qwen2": WORDS.replace("{DIGITS}", "")}


def read_tokenizer(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def gguf_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The byte-level BPE that a GGUF file describes."""
    kind, pre = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in ("smollm", *SPLITS):
        raise ValueError(
            f"tokenizer.ggml.model {kind!r} with tokenizer.ggml.pre {pre!r} is not supported, only 'gpt2' "
            f"with 'smollm', {', '.join(map(repr, SPLITS))}: take the model's {TOKENIZER} instead"
        )
    words, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    vocabulary = {word: number for number, word in enumerate(words)}
    # Llama 3 takes a word that is in the vocabulary whole, whatever the merges would make of it.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        cut = pre_tokenizers.Digits(individual_digits=True)
    else:
        cut = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    pairs = list(zip(words, kinds, strict=True))
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word, k in pairs if k == CONTROL])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word, k in pairs if k == USER_DEFINED])
    if field(reader, "tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        start = field(reader, "tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    f"{words[start]} $A", f"{words[start]} $A {words[start]}:1 $B:1", [(words[start], start)]
                ),
            ]
        )
    return tokenizer


def gguf_tokenizer_config(reader: gguf.GGUFReader) -> dict[str, str]:
    """The tokenizer_config.json that transformers wants beside a tokenizer.json."""
    words = field(reader, "tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    found = {role: reader.fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    config = {role: words[number.contents()] for role, number in found.items() if number is not None}
    if template := field(reader, "tokenizer.chat_template", ""):
        config["chat_template"] = template
    return {"tokenizer_class": "PreTrainedTokenizerFast", **config}


def chatml(messages: Iterable[Mapping[str, str]]) -> str:
    """SmolLM2's prompt: messages {"role": ..., "content": ...}, then the start of the assistant's answer.

    Without a system message the one that the model was trained with stands in front.
    """
    messages = list(messages)
    if not messages or messages[0]["role"] != "system":
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        messages = [{"role": "system", "content": system}, *messages]
    texts = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(texts) + "<|im_start|>assistant\n"
