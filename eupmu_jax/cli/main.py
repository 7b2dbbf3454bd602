"""The command line: eupmu unlearn, evaluate and report, for a model that `export_model` has written."""

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

try:
    import tyro
except ImportError:
    raise SystemExit('error: the extra "cli" is missing: pip install "eupmu_jax[cli]"') from None

from eupmu_jax import objectives
from eupmu_jax.cli import report
from eupmu_jax.cli.exported import FUNCTION, load_model, logits_in_batches
from eupmu_jax.evaluation import membership_attack
from eupmu_jax.method.losses import Losses
from eupmu_jax.run.batches import check_set
from eupmu_jax.run.files import write_whole
from eupmu_jax.run.provenance import provenance
from eupmu_jax.run.stopping import reached
from eupmu_jax.run.unlearn import unlearn

# Evaluations on the way look at so many rows of each set, the one at the end at all.
ROWS_ON_THE_WAY = 2048
# Its time grows with their square.
ROWS_FOR_THE_ATTACK = 5000
# With the paper's temperature, and one from the middle of the range that SimNPO's code searches.
BETA = {"npo": 0.1, "simnpo": 2.5}
OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
}


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

    budget: float = 0.1
    """How much the retain loss may rise over the whole run, in nats."""

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


def load_set(path: pathlib.Path, name: str, apply: Any, params: Any) -> dict[str, np.ndarray]:
    """x, y and perhaps mask of an .npz file that go with the model; ValueError that says what is wrong."""
    try:
        # Pickled objects could run code.
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in ("x", "y", "mask") if key in file}
    except Exception as error:
        raise ValueError(f"--{name} {path} is no .npz file of arrays: {error}") from error
    if not {"x", "y"} <= data.keys():
        raise ValueError(f"--{name} {path} must hold arrays x and y, got {sorted(data)}")
    check_set(data, name, batch_size=1)
    try:
        logits = jax.eval_shape(apply, params, data["x"][:1])
    except Exception as error:
        raise ValueError(
            f"--{name} {path}: the model does not take x, {data['x'].dtype} {data['x'].shape}: {error}"
        ) from error
    labels, shape = data["y"], (len(data["x"]), *logits.shape[1:-1])
    if labels.shape != shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"--{name} {path}: y must be integers {list(shape)}, got {labels.dtype} {list(labels.shape)}"
        )
    mask = data.get("mask", np.ones(shape, bool))
    if mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"--{name} {path}: mask must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    counted = labels[mask]
    if not counted.size:
        raise ValueError(f"--{name} {path}: mask lets nothing count")
    if counted.min() < 0 or counted.max() >= logits.shape[-1]:
        raise ValueError(
            f"--{name} {path}: y must be from 0 to {logits.shape[-1] - 1}, the model's classes, got "
            f"{counted.min()} to {counted.max()}; mask what does not count"
        )
    return data


def masked_mean(values: jax.Array, rows: Any) -> Any:
    mask = rows.get("mask")
    return objectives.masked_mean(values, mask if mask is None or mask.ndim == 1 else mask.any(-1))


def log_probability(logits: jax.Array, rows: Any) -> jax.Array:
    """Of the class, or of all tokens that count; [B]."""
    if logits.ndim == 2:
        return -objectives.cross_entropy(logits, rows["y"], rows.get("mask"))
    return objectives.sequence_log_probability(logits, rows["y"], rows.get("mask"))


def forget_values(config: Unlearn, logits: jax.Array, rows: Any, key: jax.Array) -> jax.Array:
    """The objective of each example; [B]."""
    labels, mask = rows["y"], rows.get("mask")
    beta = BETA.get(config.objective) if config.beta is None else config.beta
    match config.objective:
        case "random-labels":
            wrong = objectives.wrong_labels(key, labels, logits.shape[-1], mask)
            return objectives.cross_entropy(logits, wrong, mask)
        case "unlikelihood":
            return objectives.unlikelihood(logits, labels, mask)
        case "gradient-ascent":
            return objectives.gradient_ascent(logits, labels, mask)
        case "kl-to-uniform":
            return objectives.kl_to_uniform(logits, mask)
        case "npo":
            return objectives.npo(log_probability(logits, rows), rows["reference"], beta)
        case "simnpo":
            counts = jnp.ones(labels.shape, bool) if mask is None else mask
            length = counts.reshape(len(labels), -1).sum(-1)
            return objectives.simnpo(log_probability(logits, rows), length, beta)


def scores(logits: np.ndarray, rows: Any) -> dict[str, float]:
    """Mean cross-entropy in nats and accuracy from 0 to 1 of what counts."""
    mean = masked_mean(objectives.cross_entropy(logits, rows["y"], rows.get("mask")), rows)
    # No class is the greatest where one is NaN or infinite.
    right = np.where((logits < np.inf).all(-1), logits.argmax(-1) == rows["y"], np.nan)
    counts = rows.get("mask", np.ones(rows["y"].shape, bool))
    return {"cross_entropy": float(mean.total / mean.count), "accuracy": float(right[counts].mean())}


def evaluated(apply: Any, params: Any, sets: Any, attack: bool = False) -> dict[str, dict[str, float]]:
    """For each set its scores, and what share of the forget set the attack takes for unseen, in percent."""
    logits = {name: logits_in_batches(apply, params, rows["x"]) for name, rows in sets.items()}
    found = {name: scores(logits[name], rows) for name, rows in sets.items()}
    if attack and "test" in sets and logits["forget"].ndim == 2:
        forget, retain, test = (predicted(logits[name], sets[name]) for name in ("forget", "retain", "test"))
        attacked = membership_attack(forget, retain, test, ("confidence",))
        found["forget"]["taken for unseen"] = attacked["confidence"]
    return found


def predicted(logits: np.ndarray, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, labels) of the first rows that count, as many as the attack can take."""
    counts = np.flatnonzero(rows.get("mask", np.ones(len(logits), bool)))[:ROWS_FOR_THE_ATTACK]
    return np.asarray(jax.nn.softmax(logits[counts])), rows["y"][counts]


def add_to_evaluation(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Prints models x sets x scores, and adds them to evaluation.json."""
    path = folder / "evaluation.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    write_whole(path, json.dumps(before | found, indent=2) + "\n")
    print(report.as_text(found))


def run_unlearn(config: Unlearn) -> None:
    apply, params = load_model(config.model)
    paths = {"forget": config.forget, "retain": config.retain, "test": config.test}
    sets = {name: load_set(path, name, apply, params) for name, path in paths.items() if path}
    retain_size = config.retain_batch_size
    sizes = config.batch_size, config.batch_size if retain_size is None else retain_size
    if config.beta is not None and (config.objective not in BETA or not config.beta > 0):
        raise ValueError(f"--beta must be > 0 and goes with {' or '.join(BETA)}, got {config.beta}")
    if not 0 < config.learning_rate < np.inf:
        raise ValueError(f"--learning-rate must be > 0, got {config.learning_rate}")
    if config.stop_at is not None and not 0 <= config.stop_at < 1:
        raise ValueError(f"--stop-at must be an accuracy from 0 to 1, got {config.stop_at}")
    compiled = jax.jit(apply)
    forget = dict(sets["forget"])
    if config.objective == "npo":
        logits = logits_in_batches(compiled, params, forget["x"])
        forget["reference"] = np.asarray(log_probability(jnp.asarray(logits), forget))

    def losses_fn(params, batch):
        forget, retain = batch["forget"], batch["retain"]
        values = forget_values(config, apply(params, forget["x"]), forget, batch["key"])
        kept = objectives.cross_entropy(apply(params, retain["x"]), retain["y"], retain.get("mask"))
        return Losses(masked_mean(values, forget), masked_mean(kept, retain))

    some = {name: {key: part[:ROWS_ON_THE_WAY] for key, part in rows.items()} for name, rows in sets.items()}

    def evaluate(params):
        found = evaluated(compiled, params, some)
        return {f"{name}_{score}": value for name, row in found.items() for score, value in row.items()}

    settings = check_config(config)
    unlearned, history = unlearn(
        losses_fn,
        params,
        forget,
        sets["retain"],
        OPTIMIZERS[config.optimizer](config.learning_rate),
        steps=config.steps,
        batch_size=sizes,
        seed=config.seed,
        evaluate=evaluate,
        every=config.every,
        stop=None if config.stop_at is None else reached("forget_accuracy", at_most=config.stop_at),
        callbacks=[lambda params, metrics: write_config(config, settings)],
        folder=config.folder,
        budget=config.budget,
    )
    shutil.copyfile(config.model / FUNCTION, config.folder / FUNCTION)
    print(f"{len(history.steps['multiplier'])} steps" + (f"; {history.stopped}" if history.stopped else ""))
    if bool(np.any(history.steps["infeasible"][-1])):
        print("The budget looks infeasible: fine-tuning on the retain set alone would not hold it either.")
    found = {"before": evaluated(compiled, params, sets), "after": evaluated(compiled, unlearned, sets)}
    add_to_evaluation(config.folder, found)
    page = report.write(config.folder)
    if any(np.isnan(value) for row in found["after"].values() for value in row.values()):
        raise RuntimeError(
            f"the model of this run is broken, its logits are not finite: give a lower --learning-rate and a "
            f"new --folder; {page} shows where it happened"
        )
    print(f"Look at {page}")


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


def run_evaluate(config: Evaluate) -> None:
    found = {}
    for name, folder in (("model", config.model), ("reference", config.reference)):
        if folder is None:
            continue
        apply, params = load_model(folder)
        paths = {"forget": config.forget, "retain": config.retain, "test": config.test}
        sets = {kind: load_set(path, kind, apply, params) for kind, path in paths.items() if path}
        found[f"{name} {folder}"] = evaluated(jax.jit(apply), params, sets, attack=True)
    add_to_evaluation(config.model, found)


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
    from_file = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return ["unlearn", *from_file, *arguments[2:]]


Command = (
    Annotated[Unlearn, tyro.conf.subcommand("unlearn")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main(arguments: list[str] | None = None) -> None:
    try:
        given = with_settings(sys.argv[1:] if arguments is None else arguments)
        config = tyro.cli(Command, prog="eupmu", args=given, description=__doc__)  # pyright: ignore[reportCallIssue,reportArgumentType]
        if isinstance(config, Unlearn):
            run_unlearn(config)
        elif isinstance(config, Evaluate):
            run_evaluate(config)
        else:
            print(report.write(config.folder))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
