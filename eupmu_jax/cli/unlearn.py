"""eupmu unlearn: a run on files, from the model's folder to the unlearned one's."""

import shutil
from collections.abc import Callable

import numpy as np
import optax

from eupmu_jax import objectives
from eupmu_jax.cli import report
from eupmu_jax.cli.config import Unlearn, check_config, constraint_of, resolved, write_config
from eupmu_jax.cli.evaluate import add_to_evaluation, load_set, make_evaluate
from eupmu_jax.cli.exported import FUNCTION, in_batches, load_model
from eupmu_jax.cli.objective import BETA, forget_values, log_probability, masked_mean
from eupmu_jax.method.losses import Losses
from eupmu_jax.run.promise import verdict
from eupmu_jax.run.stopping import reached
from eupmu_jax.run.unlearn import unlearn

# Evaluations on the way look at so many rows of each set, the one at the end at all.
ROWS_ON_THE_WAY = 2048
OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
}


def run_unlearn(config: Unlearn) -> bool:
    """Unlearns, prints before and after, writes report and model; returns whether the budget was kept."""
    config = resolved(config)
    constraint = constraint_of(config)
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
    look = make_evaluate(apply)
    forget = dict(sets["forget"])
    if config.objective == "npo":
        forget["reference"] = in_batches(log_probability, apply)(params, forget)

    def losses_fn(params, batch):
        forget, retain = batch["forget"], batch["retain"]
        values = forget_values(config, apply(params, forget["x"]), forget, batch["key"])
        kept = objectives.cross_entropy(apply(params, retain["x"]), retain["y"], retain.get("mask"))
        return Losses(masked_mean(values, forget), masked_mean(kept, retain))

    some = {name: {key: part[:ROWS_ON_THE_WAY] for key, part in rows.items()} for name, rows in sets.items()}

    def evaluate(params):
        found = look(params, some)
        return {f"{name}_{score}": value for name, row in found.items() for score, value in row.items()}

    settings = check_config(config)
    unlearned, history = unlearn(
        losses_fn,
        params,
        forget,
        sets["retain"],
        OPTIMIZERS[config.optimizer](config.learning_rate),
        constraint,
        steps=config.steps,
        batch_size=sizes,
        seed=config.seed,
        evaluate=evaluate,
        every=config.every,
        stop=None if config.stop_at is None else reached("forget_accuracy", at_most=config.stop_at),
        callbacks=[lambda params, metrics: write_config(config, settings)],
        folder=config.folder,
    )
    shutil.copyfile(config.model / FUNCTION, config.folder / FUNCTION)
    print(f"{len(history.steps['multiplier'])} steps" + (f"; {history.stopped}" if history.stopped else ""))
    if bool(np.any(history.steps["infeasible"][-1])):
        print("The budget looks infeasible: fine-tuning on the retain set alone would not hold it either.")
    found = {"before": look(params, sets), "after": look(unlearned, sets)}
    add_to_evaluation(config.folder, found)
    page = report.write(config.folder)
    if any(np.isnan(value) for row in found["after"].values() for value in row.values()):
        raise RuntimeError(
            f"the model of this run is broken, its logits are not finite: give a lower --learning-rate and a "
            f"new --folder; {page} shows where it happened"
        )
    if history.promise is not None:
        print(verdict(history.promise))
    print(f"Look at {page}")
    return history.promise is None or history.promise.holds
