"""How each method is run: by `eu.unlearn` under a constraint, or a peer of the shared room step by step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eu
from experiments.language.losses import (
    Forget,
    Model,
    forget_loss,
    hidden_of,
    make_losses,
    retain_losses,
    tokens_of,
)
from experiments.language.texts import Rows
from experiments.shared.methods.method import Batch, LossFunctions, Method
from experiments.shared.models.llama.config import Config


class Job(NamedTuple):
    """One unlearning: what is forgotten, what is kept, and for how long.

    Attributes:
      config: the model's.
      objective: the kind of forget loss.
      forget: the rows to forget, all of which are in every step.
      retain, held_out: rows of each utility, trained on and kept apart.
      sizes: how many retain rows of each a step sees.
      bound: the mean retain loss that the budgets allow.
      rate, steps: Adam's.
      trains: which leaves are trained, by their path.
      seed: of the batches.
    """

    config: Config
    objective: str
    forget: Forget
    retain: Mapping[str, Rows]
    held_out: Mapping[str, Rows]
    sizes: Mapping[str, int]
    bound: float
    rate: float
    steps: int
    trains: Callable[[str], bool]
    seed: int


# Adam's first step moves every weight by the whole rate, before any loss was seen to rise.
WARM_UP = 4
"""Steps until the rate is whole."""


def optimizer(job: Job) -> optax.GradientTransformation:
    """Adam, of every method."""
    return optax.adam(optax.linear_schedule(job.rate / WARM_UP, job.rate, WARM_UP - 1))


Seen = dict[str, Any]
Unlearn = Callable[[Job, Model, Callable[[], None]], tuple[Model, Seen]]
"""(job, model, called after each step) -> the model, and what was seen."""


def told_of_steps(tell: Callable[[], None]) -> Callable[[Any, dict[str, Any]], None]:
    """A callback that tells of every step, and not of the look before the first."""

    def callback(params: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"]:
            tell()

    return callback


def by_constraint(constraint: eu.Tolerance | eu.Budget) -> Unlearn:
    """`eu.unlearn`: EUPMU, and its budgets measured and repaired."""

    def unlearn(job: Job, model: Model, tell: Callable[[], None]) -> tuple[Model, Seen]:
        model, history = eu.unlearn(
            make_losses(job.config, job.objective), model, job.forget, dict(job.retain),
            optimizer(job), constraint, steps=job.steps,
            batch_size=(len(job.forget.reference), dict(job.sizes)), seed=job.seed, trainable=job.trains,
            callbacks=[told_of_steps(tell)], every=1,
            held_out=dict(job.held_out) if isinstance(constraint, eu.Budget) else None,
        )  # fmt: skip
        seen: Seen = {key: history.steps[key] for key in ("forget_loss", "retain_loss", "multiplier")}
        if history.promise is not None:
            seen["promise"] = history.promise._asdict()
        return model, seen

    return unlearn


def by_peer(make: Callable[..., Method], knobs: Callable[[Job], dict[str, float]]) -> Unlearn:
    """A method of one retain loss, here the mean of all utilities'; it trains all weights."""

    def unlearn(job: Job, model: Model, tell: Callable[[], None]) -> tuple[Model, Seen]:
        def forget(base: Any, rows: Forget) -> jax.Array:
            model = {"base": base, "adapter": {}}
            hidden = hidden_of(job.config, model, jnp.asarray(rows.rows.tokens))
            mean = forget_loss(job.objective, model, hidden, rows)
            return mean.total / mean.count

        def training(base: Any, retain: Mapping[str, Rows]) -> jax.Array:
            model = {"base": base, "adapter": {}}
            hidden = hidden_of(job.config, model, jnp.concatenate(tokens_of(retain)))
            means = retain_losses(model, hidden, retain)
            return means.total / means.count

        def divergence(reference: Any, base: Any, rows: Any) -> jax.Array:
            raise NotImplementedError("no peer of this study asks for it")

        method = make(LossFunctions(forget, training, divergence), optimizer(job), **knobs(job))
        step = jax.jit(method.step, donate_argnums=(0, 1))
        # The first step takes the buffers over.
        base = jax.tree.map(jnp.copy, model["base"])
        rng, seen = np.random.default_rng(job.seed), []

        def batch(progress: float) -> Batch:
            rows = {
                name: part.taken(rng.choice(len(part.tokens), job.sizes[name], replace=False))
                for name, part in job.retain.items()
            }
            return Batch(job.forget, rows, jnp.float32(progress), jnp.float32(0))

        state = method.init(base, batch(0))
        for i in range(job.steps):
            base, state, of_step = step(base, state, batch(i / job.steps))
            seen.append(jax.device_get(of_step))
            tell()
        return {"base": base, "adapter": {}}, {key: np.array([one[key] for one in seen]) for key in seen[0]}

    return unlearn
