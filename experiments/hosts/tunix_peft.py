"""Tunix's PeftTrainer: a Llama with LoRA by Qwix forgets four answers, by a loss and an optimiser alone.

pip install -e ".[tunix]" && python -m experiments.language.fetch && python -m experiments.hosts.tunix_peft
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix  # pyright: ignore[reportMissingImports]
from flax import nnx
from tunix.models.llama3 import model as llama  # pyright: ignore[reportMissingImports]
from tunix.models.llama3 import params as llama_params  # pyright: ignore[reportMissingImports]
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig  # pyright: ignore[reportMissingImports]

import eupmu_jax as eu
from eupmu_jax.flax import Weighted, lagrangian, saddle_point
from eupmu_jax.objectives import cross_entropy, unlikelihood
from experiments.language.fetch import model_path
from experiments.language.texts import CHAT, TOPICS, Rows, chat, prose
from experiments.shared.models.llama import files

STEPS, ACCUMULATED, ROWS, LENGTH = 20, 4, 4, 48
TOTALS = {"the other answers": 0.1, "prose": 0.1}
"""How much the loss of each may rise, in nats per token."""
AT_ONCE = 4
"""Rows whose logits exist at a time where all are measured; it divides the rows of every set."""


class Outcome(NamedTuple):
    """Tokens of the answers that are still given, before and after, of how many; rises of the losses."""

    given: tuple[int, int]
    tokens: int
    rises: np.ndarray


def load(source: pathlib.Path) -> Any:
    """Tunix's Llama of a folder or .gguf file, with adapters that do nothing yet."""
    shape, params = files.load(source, jnp.float32)
    config = llama.ModelConfig(
        num_layers=shape.num_hidden_layers, vocab_size=shape.vocab_size, embed_dim=shape.hidden_size,
        hidden_dim=shape.intermediate_size, num_heads=shape.num_attention_heads, head_dim=shape.head_dim,
        num_kv_heads=shape.num_key_value_heads, rope_theta=int(shape.rope_theta), norm_eps=shape.rms_norm_eps,
        weight_tying=shape.tie_word_embeddings,
    )  # fmt: skip
    # Tunix 0.1.7 leaves rope_theta out where it rotates, and takes 1,000,000 for every model.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)
    with tempfile.TemporaryDirectory() as folder:
        files.save(pathlib.Path(folder) / "model", shape, params)
        del params
        model = llama_params.create_model_from_safe_tensors(f"{folder}/model", config, dtype=jnp.float32)
    adapters = qwix.LoraProvider(module_path=".*q_proj|.*v_proj", rank=8, alpha=16.0)
    return qwix.apply_lora_to_model(model, adapters, rngs=nnx.Rngs(0), **model.get_model_input())


def load_sets(source: pathlib.Path, length: int) -> dict[str, Rows]:
    """Four answers to forget, 28 others, and rows of the Python language reference."""
    tokenizer = files.load_tokenizer(source)
    answers = chat(tokenizer, CHAT, length)
    return {
        "forget": answers.taken(slice(4)),
        "the other answers": answers.taken(slice(4, 32)),
        "prose": prose(tokenizer, TOPICS, 28, length),
    }


def predict(model: Any, tokens: Any) -> jax.Array:
    """The logits of what follows each token."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    causal = jnp.tril(jnp.ones((1, tokens.shape[1], tokens.shape[1]), bool))
    return model(tokens, positions, None, causal)[0]


def loss(objective: Callable[..., jax.Array], model: Any, rows: Rows) -> jax.Array:
    """The mean over rows of the mean over the tokens that count, so that equal parts average to the whole."""
    return objective(predict(model, rows.tokens[:, :-1]), rows.tokens[:, 1:], rows.mask[:, 1:]).mean()


def losses(model: Any, batch: dict[str, Rows]) -> eu.Losses:
    return eu.Losses(
        forget=loss(unlikelihood, model, batch["forget"]),
        retain=jnp.stack([loss(cross_entropy, model, batch[name]) for name in TOTALS]),
    )


def batches(sets: dict[str, Rows], size: int, seed: int = 0) -> Iterator[dict[str, Rows]]:
    """Micro-batches without end, each drawn independently of the one before."""
    rng = np.random.default_rng(seed)
    while True:
        yield {name: rows.taken(rng.choice(len(rows.mask), size)) for name, rows in sets.items()}


def train(
    module: Weighted, tx: Any, data: Iterator[Any], steps: int, folder: str | None = None,
    accumulated: int | None = ACCUMULATED,
) -> Any:  # fmt: skip
    """Tunix's own trainer. It goes on from the last checkpoint of the folder, where there is one."""
    config = TrainingConfig(
        eval_every_n_steps=steps, max_steps=steps, gradient_accumulation_steps=accumulated,
        checkpoint_root_directory=folder,
    )  # fmt: skip
    trainer = PeftTrainer(module, tx, config).with_loss_fn(lagrangian(losses))
    trainer = trainer.with_gen_model_input_fn(lambda batch: {"batch": batch})
    trainer.train(data)
    return trainer


@nnx.jit
def measured_rows(model: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Nats per token, and how many of the tokens that count have the highest logit."""
    logits = predict(model, rows.tokens[:, :-1])
    tokens, mask = rows.tokens[:, 1:], rows.mask[:, 1:]
    given = jnp.sum((jnp.argmax(logits, -1) == tokens) & mask)
    return cross_entropy(logits, tokens, mask).mean(), given


def measured(model: Any, sets: dict[str, Rows]) -> tuple[np.ndarray, int]:
    """The losses of what should stay, on all rows, and the tokens of the forgotten answers still given."""
    found = {}
    for name, rows in sets.items():
        parts = (rows.taken(slice(at, at + AT_ONCE)) for at in range(0, len(rows.mask), AT_ONCE))
        found[name] = np.array([measured_rows(model, jax.tree.map(jnp.asarray, part)) for part in parts])
    return np.array([found[name][:, 0].mean() for name in TOTALS]), int(found["forget"][:, 1].sum())


def main(
    source: pathlib.Path | None = None, length: int = LENGTH, steps: int = STEPS, rate: float = 1e-3
) -> Outcome:
    source = source or model_path()
    sets = load_sets(source, length)
    model = load(source)
    before, given_before = measured(model, sets)

    budget = eu.Budget(np.array([*TOTALS.values()]), baseline=before)
    multiplier = np.ones(len(TOTALS))
    tx = saddle_point(optax.adam(rate), budget, initial_multiplier=multiplier)
    with tempfile.TemporaryDirectory() as folder:
        for until in (steps // 2, steps):
            # The second time it is as after a kill: all is built anew, and the trainer reads its checkpoint.
            model = load(source)
            module = Weighted(model, budget, initial_multiplier=multiplier)
            train(module, tx, batches(sets, size=ROWS), until, folder)

    after, given = measured(model, sets)
    outcome = Outcome((given_before, given), int(sets["forget"].mask[:, 1:].sum()), after - before)
    print(f"Forgotten: of the {outcome.tokens} tokens of four answers it gave {given_before}, now {given}.")
    for (name, total), rise in zip(TOTALS.items(), outcome.rises, strict=True):
        kept = "kept" if rise <= total else "not kept"
        print(f"The budget of {name} is {kept}: the loss rose by {rise:.3f} of {total} nats.")
    return outcome


if __name__ == "__main__":
    main()
