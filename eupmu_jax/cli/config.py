"""What the command line can be asked for, and the files that keep it."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any, Literal

import tyro

from eupmu_jax.method.constraints import Budget, Constraint, Tolerance
from eupmu_jax.run.files import write_whole
from eupmu_jax.run.provenance import provenance

DEFAULT_BUDGET = 0.1

# One of the two, which tyro's help shows and its parser enforces.
Bound = tyro.conf.create_mutex_group(required=False)
Objective = Literal["random-labels", "unlikelihood", "gradient-ascent", "kl-to-uniform", "npo", "simnpo"]


@dataclasses.dataclass(frozen=True)
class Unlearn:
    """Make a model forget a set of examples while the loss on others rises by no more than a budget.

    The model is a folder that eupmu_jax.export_model(folder, apply, params, inputs) has written from any JAX
    function. The sets are .npz files of arrays with a leading axis of examples: x, the inputs; y, the
    classes [n] or next tokens [n, T]; and, if not all entries of y count, a boolean mask of its shape.

    A run that was interrupted goes on when the same command is given again. Its folder then holds
    config.json, metrics.jsonl, checkpoints, curves.png, report.html, evaluation.json and the unlearned
    model, itself such a folder. Settings may also come first as a JSON file, which arguments override:

        eupmu unlearn settings.json --folder runs/second

    That of a run, config.json in its folder, goes on with it.
    """

    model: pathlib.Path
    """Folder of the trained model."""

    forget: pathlib.Path
    """What to forget: .npz of x, y and perhaps mask."""

    retain: pathlib.Path
    """What to remain good at, all other training data or a sample of it: likewise."""

    folder: pathlib.Path
    """Where the run is kept; a new folder, or that of the interrupted run."""

    test: pathlib.Path | None = None
    """Held-out examples to evaluate on, likewise."""

    objective: Objective = "random-labels"
    """What to minimise on the forget set. For language models: npo or simnpo."""

    beta: float | None = None
    """Inverse temperature of npo (None: 0.1) and simnpo (None: 2.5)."""

    budget: Annotated[float | None, Bound] = None
    """How much the retain loss may rise over the whole run, in nats. 0.1 where no tolerance is given."""

    tolerance: Annotated[float | None, Bound] = None
    """In its place: how much it may rise in each step, in nats; negative demands a fall. Steps add up."""

    measure: Literal["lagged", "lookahead"] | None = None
    """How a tolerance is observed: from batch to batch (None: lagged), or again on the batch stepped on."""

    optimizer: Literal["adam", "adamw", "sgd", "momentum"] = "adam"
    """The inner optimiser."""

    learning_rate: float = 1e-4
    """Its learning rate; the one that the model was trained with, or a tenth of it, is a good start."""

    steps: int = 1000
    """How many steps."""

    batch_size: int = 64
    """Rows of the forget batch, at most the whole set."""

    retain_batch_size: int | None = None
    """Rows of the retain batch; the larger, the better a small budget is kept. None: the same."""

    every: int | None = None
    """Steps between evaluations and checkpoints. None: a tenth of the steps."""

    stop_at: float | None = None
    """End once the accuracy on the forget set is at most this (0 to 1)."""

    seed: int = 0
    """Of batches and wrong labels."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Cross-entropy, accuracy and a membership attack of a model, on sets like those of `eupmu unlearn`.

    Prints them and adds them to evaluation.json in the model's folder. The attack, for classes and with a
    test set only, tells what share of the forget set it takes for never trained on, in percent: a retrained
    model shows what that should be. Give that model with --reference to see both side by side.
    """

    model: pathlib.Path
    """Folder of the model, for instance that of a run of `eupmu unlearn`."""

    forget: pathlib.Path
    """What should be forgotten: .npz of x, y and perhaps mask."""

    retain: pathlib.Path
    """What should be known, likewise."""

    test: pathlib.Path | None = None
    """Held-out examples, likewise; without those of a forgotten class."""

    reference: pathlib.Path | None = None
    """Folder of a model to compare with: one that was trained without the forget set, or the original."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw curves.png and write report.html, one page that needs no other file, into a run's folder.

    For any folder of eupmu_jax.unlearn, also of a run that is not finished.
    """

    folder: tyro.conf.Positional[pathlib.Path]
    """The run's folder."""


def resolved(config: Unlearn) -> Unlearn:
    """`config` with its bound stated: the budget that is meant where none is given."""
    if config.measure is not None and config.tolerance is None:
        raise ValueError(f"--measure goes with --tolerance, got {config.measure} without one")
    if config.budget is None and config.tolerance is None:
        return dataclasses.replace(config, budget=DEFAULT_BUDGET)
    return config


def constraint_of(config: Unlearn) -> Constraint:
    """The bound as `unlearn` takes it."""
    if config.tolerance is not None:
        return Tolerance(config.tolerance, measure=config.measure or "lagged")
    assert config.budget is not None, "resolved"
    return Budget(config.budget)


def check_config(config: Unlearn) -> dict[str, Any]:
    """The settings for config.json; ValueError if the folder's run had others."""
    as_plain = lambda value: str(value.resolve()) if isinstance(value, pathlib.Path) else value
    settings = {name: as_plain(value) for name, value in vars(config).items() if name != "folder"}
    path = config.folder / "config.json"
    if path.exists() and (saved := read_settings(path)) != settings:
        names = [name for name, value in settings.items() if saved.get(name) != value]
        changes = "; ".join(f"{name}: {saved.get(name)} there, {settings[name]} now" for name in names)
        raise ValueError(
            f"--folder {config.folder} holds a run with other settings ({changes}): give the same to go on "
            "with it, or a new folder"
        )
    return settings


def write_config(config: Unlearn, settings: dict[str, Any]) -> None:
    """config.json: the settings, and what ran them."""
    path = config.folder / "config.json"
    if path.exists():
        return
    write_whole(path, json.dumps({"config": settings, "made by": provenance()}, indent=2) + "\n")


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """The settings of a JSON file: an object of them, or config.json of a run."""
    try:
        read = json.loads(path.read_text())
        settings = dict(read.get("config", read))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object of settings: {error}") from error
    known = [field.name for field in dataclasses.fields(Unlearn)]
    if unknown := settings.keys() - set(known):
        raise ValueError(f"{path}: unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if wrong := [name for name, value in settings.items() if isinstance(value, list | dict | bool)]:
        raise ValueError(f"{path}: {', '.join(sorted(wrong))} must be a number, a string or null")
    return settings


def with_settings(arguments: list[str]) -> list[str]:
    """`unlearn settings.json --more ...` with the file's settings as arguments, which tyro checks."""
    if arguments[:1] != ["unlearn"] or len(arguments) < 2 or arguments[1].startswith("-"):
        return arguments
    path = pathlib.Path(arguments[1])
    given = read_settings(path)
    if (path.parent / "run.json").exists():
        given["folder"] = str(path.parent)
    # A bound of the command line takes the place of the file's, of whichever kind.
    bounds = {"budget", "tolerance", "measure"}
    is_bound = lambda argument: argument.split("=")[0].removeprefix("--") in bounds
    replaced = bounds if any(map(is_bound, arguments[2:])) else set()
    given = {name: value for name, value in given.items() if value is not None and name not in replaced}
    from_file = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return ["unlearn", *from_file, *arguments[2:]]


Command = (
    Annotated[Unlearn, tyro.conf.subcommand("unlearn")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)
