"""Forget a class, then a random tenth of the training data; compare six methods with retraining."""

import dataclasses
import pathlib
import sys
import time
from typing import Literal

import jax
import optax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from eupmu_jax import evaluation
from experiments import classifier, data, methods, report

WEIGHTS = (1.0, 3.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Forget a class, then a random tenth of the training data, and compare with retraining.

    Trains a small network, unlearns with a few constant weights, exact surgery and EUPMU, prints a
    table for each task and writes results and plots to a new folder under --runs-dir.
    """

    dataset: Literal["digits", "fashion-mnist"] = "digits"
    """Which images: digits come with scikit-learn, Fashion-MNIST with Debian's dataset-fashion-mnist."""

    data_dir: pathlib.Path = data.FASHION_MNIST_DIR
    """Folder of Fashion-MNIST's four IDX files, gzipped or not."""

    learning_rate: float = 0.01
    """Of SGD with momentum 0.9, in every method."""

    tolerance: float = -0.02
    """EUPMU's allowed rise of the log retain loss per step; negative asks for a fall."""

    seed: int = 0
    """Of the data split, the training, the wrong labels and the order of the batches."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a data set fixes: a network and a training that fit it in seconds."""

    epochs: int
    forget_class: int
    class_name: str
    batch_size: int = 64
    training_rate: float = 1e-3
    unlearning_epochs: int = 5


SETTINGS = {
    "digits": Setting(epochs=40, forget_class=3, class_name="3"),
    "fashion-mnist": Setting(epochs=30, forget_class=6, class_name="Shirt"),
}


def load(config: Config) -> tuple[data.Examples, data.Examples]:
    if config.dataset == "digits":
        return data.digits(config.seed)
    return data.fashion_mnist(config.seed, config.data_dir, train_size=6000, test_size=2000)


def unlearning_methods(losses_fn, config: Config) -> dict[str, methods.Method]:
    optimizer = optax.sgd(config.learning_rate, momentum=0.9)
    eupmu = lambda measure: methods.eupmu(
        losses_fn, optimizer, measure=measure, tolerance=config.tolerance, log_losses=True
    )
    constant = {f"constant {w:g}": methods.scalarisation(losses_fn, optimizer, w) for w in WEIGHTS}
    return constant | {
        "exact surgery": methods.exact_surgery(losses_fn, optimizer),
        "EUPMU (lookahead)": eupmu("lookahead"),
        "EUPMU (lagged)": eupmu("lagged"),
    }


def run(config: Config, train_set: data.Examples, test_set: data.Examples, progress: Progress):
    """Results of every task, and each unlearning method's history."""
    setting = SETTINGS[config.dataset]
    classes = int(train_set.y.max()) + 1
    model = classifier.MLP(classes)
    losses_fn = classifier.make_losses(model)
    full_losses = jax.jit(losses_fn)
    predict = jax.jit(lambda params, x: jax.nn.softmax(classifier.apply(model, params, x)))
    unlearners = unlearning_methods(losses_fn, config)
    splits = {
        f"class {setting.class_name}": data.forget_class(train_set, test_set, setting.forget_class),
        "random 10%": data.forget_random(train_set, test_set, 0.1, config.seed),
    }
    bar = progress.add_task("", total=1 + len(splits) * (1 + len(unlearners)))

    def report_as(what):
        progress.update(bar, description=what)
        return lambda part: progress.update(bar, advance=part)

    def trained(what, examples, seed):
        return classifier.train(
            model,
            examples,
            epochs=setting.epochs,
            batch_size=setting.batch_size,
            learning_rate=setting.training_rate,
            seed=seed,
            report=report_as(what),
        )

    original, original_seconds = trained("training the original", train_set, config.seed)
    tasks, histories = {}, {}
    for task, split in splits.items():
        wrong = data.wrong_labels(split.forget.y, classes, config.seed)
        given = split._replace(forget=data.Examples(split.forget.x, wrong))
        steps = max(10, setting.unlearning_epochs * split.retain.size // setting.batch_size // 10 * 10)
        ends = {"Original": (original, original_seconds)}
        ends["Retrain"] = trained(f"{task}: retraining", split.retain, config.seed + 1)
        histories[task] = {}
        for name, method in unlearners.items():
            done = methods.unlearn(
                method,
                original,
                given,
                steps=steps,
                batch_size=setting.batch_size,
                seed=config.seed,
                report=report_as(f"{task}: {name}"),
            )
            ends[name] = (done.params, done.seconds)
            histories[task][name] = done.history
        rows = {}
        for name, (params, seconds) in ends.items():
            losses = full_losses(params, (given.forget, given.retain))
            predictions = [(predict(params, examples.x), examples.y) for examples in split]
            scores = evaluation.classification_scores(*predictions)
            rows[name] = scores | {
                "seconds": seconds,
                "forget_loss": float(losses.forget),
                "retain_loss": float(losses.retain),
            }
        for row in rows.values():
            row["gap"] = evaluation.average_gap(row, rows["Retrain"])
        tasks[task] = {
            "caption": caption(rows, split, steps, setting.batch_size),
            "steps": steps,
            "batch_size": setting.batch_size,
            "sizes": {part: examples.size for part, examples in split._asdict().items()},
            "methods": rows,
        }
    return tasks, histories


def caption(rows, split: data.Split, steps: int, batch_size: int) -> str:
    """How to read a table, and what its task cannot show."""
    text = (
        f"{steps} steps on {batch_size} of {split.forget.size} forget and {batch_size} of "
        f"{split.retain.size} retain examples. UA = 100 - forget accuracy, RA and TA = retain and test "
        "accuracy, MIA = share of the forget set that an attack takes for non-members (all %); gap = mean "
        "distance to Retrain in the four; nearer to Retrain is better. Seconds without compilation."
    )
    spread = rows["Original"]["RA"] - rows["Original"]["TA"]
    if spread < 5 and rows["Retrain"]["UA"] < 50:
        text += (
            f" The original has almost no generalisation gap here ({spread:.1f} points), so that Retrain "
            f"itself hardly forgets (UA {rows['Retrain']['UA']:.1f}): the table shows how much damage a "
            "method does rather than how well it forgets. Try --dataset fashion-mnist."
        )
    return text


def main(config: Config) -> None:
    console = Console()
    start = time.perf_counter()
    train_set, test_set = load(config)
    path = report.new_run_dir(config.runs_dir, f"quickstart-{config.dataset}")
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        tasks, histories = run(config, train_set, test_set, progress)
    results = report.provenance(config) | {
        "setting": dataclasses.asdict(SETTINGS[config.dataset]),
        "seconds": time.perf_counter() - start,
        "tasks": tasks,
    }
    report.write_results(path, results)
    report.plot_histories(path, histories)
    report.plot_trade_off(path, tasks)
    for task, result in tasks.items():
        console.print(report.table(f"{config.dataset}: forget {task}", result["methods"]))
        console.print(result["caption"], highlight=False, end="\n\n")
    console.print(f"{time.perf_counter() - start:.0f} s. Results and plots: {path}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m experiments.quickstart"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
