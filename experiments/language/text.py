"""Forgets a text file of yours, within a budget for each text that should stay."""

import dataclasses
import pathlib
import sys

import numpy as np
import optax
from rich.console import Console

import eupmu_jax as eu
from eupmu_jax.cli.main import BROKEN_PROMISE
from experiments.language.fetch import model_path
from experiments.language.losses import UNLIKELIHOOD, before_unlearning, make_losses
from experiments.language.measures import measured
from experiments.language.texts import Rows, passages
from experiments.shared import command
from experiments.shared.models.llama.files import load, load_tokenizer, save

# Every fifth row of a text to keep is not trained on, where it has as many.
APART = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """Make a language model forget a text, and keep others within budgets.

    Cuts every text into rows of tokens, descends the unlikelihood of the text to forget, and holds the loss
    of every other text within its budget. Prints what became of each, and saves the model in Hugging Face's
    form. The exit status is 3 where the budgets could be kept by returning the model as it was only.
    """

    forget: pathlib.Path
    """The text file to forget."""

    keep: tuple[str, ...]
    """NAME=FILE of each text to keep."""

    out: pathlib.Path
    """The folder for the unlearned model; it must not exist, or be empty."""

    budget: tuple[str, ...] = ()
    """NAME=NATS: how much the loss of that text may rise, in nats per token; 0.1 where none is said."""

    model: pathlib.Path | None = None
    """A folder of Hugging Face's form or a .gguf file; None for what `experiments.language.fetch` brought."""

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
    return {name: value for name, _, value in split}


def budgets(config: Config, names: list[str]) -> eu.Budget:
    """One for each text, in sorted order."""
    said = pairs("budget", config.budget)
    if unknown := sorted(said.keys() - set(names)):
        raise ValueError(f"--budget {unknown[0]}: there is no --keep of that name")
    return eu.Budget(np.array([float(said.get(name, 0.1)) for name in sorted(names)], np.float32))


def main(config: Config) -> None:
    if config.out.exists() and any(config.out.iterdir()):
        raise FileExistsError(f"{config.out}: there are files in it, which are not overwritten")
    source = config.model or model_path()
    shape, base = load(source)
    tokenizer = load_tokenizer(source)
    read = lambda path: passages(tokenizer, pathlib.Path(path).read_text(), config.length)
    forget = read(config.forget)
    texts = {name: read(path) for name, path in pairs("keep", config.keep).items()}
    constraint = budgets(config, list(texts))
    apart = {name: np.arange(len(rows.mask)) % APART == APART - 1 for name, rows in texts.items()}
    retain = {name: rows.taken(~apart[name]) for name, rows in texts.items()}
    held_out = {name: rows.taken(apart[name]) for name, rows in texts.items()}
    smallest = min(len(rows.mask) for rows in (forget, *retain.values()))
    size = min(config.batch_size, smallest)

    model = {"base": base, "adapter": {}}
    model, history = eu.unlearn(
        make_losses(shape, UNLIKELIHOOD), model, before_unlearning(shape, model, forget, None), retain,
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
    assert history.promise is not None  # a budget over arrays
    console.print(f"{eu.verdict(history.promise)}\nThe model: {config.out}")
    if not history.promise.holds:
        sys.exit(BROKEN_PROMISE)


if __name__ == "__main__":
    command.run(main, Config, resumable=False)
