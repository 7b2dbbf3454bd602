"""Forgets a file of yours, within a budget for each file that should stay."""

import dataclasses
import pathlib
import sys
from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import eupmu_jax as eu
from eupmu_jax.cli.main import BROKEN_PROMISE
from experiments.language.fetch import model_path
from experiments.language.losses import before_unlearning, make_losses
from experiments.language.measures import measured
from experiments.language.texts import Rows, of_file
from experiments.shared import command
from experiments.shared.models.llama.files import load, load_tokenizer, save

# Every fifth row of a text to keep is not trained on, where it has as many.
APART = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """Make a language model forget a text, and keep others within budgets.

    Cuts every text into rows of tokens, descends a forget loss on the text to forget, and holds the loss
    of every other text within its budget. Prints what became of each, and saves the model in Hugging Face's
    form. The exit status is 3 where the budgets could be kept by returning the model as it was only.

    A file named .json, .jsonl or .parquet is read as one of TOFU, MUSE or WMDP: of questions with answers
    each is a row in which the answer counts, and a corpus is one text.
    """

    forget: pathlib.Path
    """The file to forget."""

    keep: tuple[str, ...]
    """NAME=FILE of each file to keep."""

    out: pathlib.Path
    """The folder for the unlearned model; it must not exist, or be empty."""

    budget: tuple[str, ...] = ()
    """NAME=NATS: how much the loss of that text may rise, in nats per token; 0.1 where none is said."""

    model: pathlib.Path | None = None
    """A folder of Hugging Face's form or a .gguf file; None for what `experiments.language.fetch` brought."""

    objective: Literal["unlikelihood", "NPO"] = "unlikelihood"
    """The forget loss. NPO takes the text further from what it was, and unseen texts like it as well."""

    steps: int = 40
    """How many steps."""

    rate: float = 5e-5
    """Adam's learning rate."""

    length: int = 64
    """Tokens of a row."""

    batch_size: int = 2
    """Rows of each text in a step."""

    seed: int = 0
    """Of the batches."""


def pairs(option: str, values: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE of a command line."""
    split = [value.partition("=") for value in values]
    if wrong := [name for name, equals, value in split if not (name and equals and value)]:
        raise ValueError(f"--{option} takes NAME=VALUE, got {wrong[0]}")
    names = [name for name, _, _ in split]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--{option} names {twice[0]} twice: each needs a name of its own")
    return {name: value for name, _, value in split}


def budgets(config: Config, names: list[str]) -> eu.Budget:
    """One for each text, in sorted order."""
    said = pairs("budget", config.budget)
    if unknown := sorted(said.keys() - set(names)):
        raise ValueError(f"--budget {unknown[0]}: there is no --keep of that name")
    for name, nats in said.items():
        try:
            float(nats)
        except ValueError as error:
            raise ValueError(f"--budget {name}={nats}: a number of nats is needed") from error
    return eu.Budget(np.array([float(said.get(name, 0.1)) for name in sorted(names)], np.float32))


def main(config: Config) -> None:
    if config.out.exists() and any(config.out.iterdir()):
        raise FileExistsError(f"{config.out}: there are files in it, which are not overwritten")
    kept = pairs("keep", config.keep)
    constraint = budgets(config, list(kept))
    for option, path in ("forget", config.forget), *(("keep", path) for path in kept.values()):
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"--{option} {path}: there is no such file")
    source = config.model or model_path()
    # In bfloat16, in which most files are, a weight of 0.02 swallows a step of 5e-5.
    shape, base = load(source, jnp.float32)
    tokenizer = load_tokenizer(source)
    read = lambda path: of_file(tokenizer, pathlib.Path(path), config.length)
    forget = read(config.forget)
    texts = {name: read(path) for name, path in kept.items()}
    apart = {name: np.arange(len(rows.mask)) % APART == APART - 1 for name, rows in texts.items()}
    retain = {name: rows.taken(~apart[name]) for name, rows in texts.items()}
    held_out = {name: rows.taken(apart[name]) for name, rows in texts.items()}
    smallest = min(len(rows.mask) for rows in (forget, *retain.values()))
    size = min(config.batch_size, smallest)

    model = {"base": base, "adapter": {}}
    model, history = eu.unlearn(
        make_losses(shape, config.objective), model, before_unlearning(shape, model, forget, None), retain,
        optax.adam(config.rate), constraint, steps=config.steps,
        batch_size=(size, dict.fromkeys(retain, size)), seed=config.seed,
        held_out=held_out if all(len(rows.mask) for rows in held_out.values()) else None,
    )  # fmt: skip
    save(config.out, shape, model["base"], like=source)
    console = Console(highlight=False, soft_wrap=True)
    sets: dict[str, Rows] = {"the text to forget": forget, **texts}
    before, after = (measured(shape, params, sets) for params in (base, model["base"]))
    for name in sets:
        nats, greedy = ([found[name][key] for found in (before, after)] for key in ("nats", "memorised"))
        console.print(
            f"{name}: {nats[0]:.3f} → {nats[1]:.3f} nats per token, greedy {greedy[0]:.1%} → {greedy[1]:.1%}"
        )
    promise = history.promise
    assert promise is not None  # a budget over arrays
    if promise.held_out_rise is not None and promise.held_out_bound is not None:
        unseen = zip(sorted(texts), promise.held_out_rise, promise.held_out_bound, strict=True)
        for name, rise, bound in unseen:
            console.print(f"{name}, rows kept apart: {rise:+.3f} nats per token, at most {bound:+.3f} (95%)")
    console.print(f"{eu.verdict(promise, sorted(texts))}\nThe model: {config.out}")
    if not promise.holds:
        sys.exit(BROKEN_PROMISE)


if __name__ == "__main__":
    command.run(main, Config, resumable=False)
