"""The loop that runs any unlearning method: paired batches, compiled chunks of steps, one record a step."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared.methods.method import Batch, Examples, LossFunctions, Method, Params
from experiments.shared.training import batch_rows

CHUNKS = 10
Knobs = Mapping[str, Any]
"""A method's settings by name: numbers, or arrays [] within a compiled step."""


class Rows(NamedTuple):
    """Row numbers [steps, batch] of the examples to forget and to retain in each step."""

    forget: np.ndarray
    retain: np.ndarray


class Plan(NamedTuple):
    """Which examples each step of a run sees.

    Attributes:
      forget_set: row numbers [k, batch] that hold the forget set once, the last batch filled up from its
        beginning.
      rows: those of each step.
      forget_share: the forget set's share of both sets.
    """

    forget_set: np.ndarray
    rows: Rows
    forget_share: np.ndarray


class Told(NamedTuple):
    """What a method is told of the model that is to forget, beside its parameters.

    Attributes:
      knobs: those that are measured of the model, not tuned.
      fields: those of the examples that depend on the model, arrays with a leading axis of examples.
    """

    knobs: dict[str, Any]
    fields: dict[str, Any]

    def to(self, knobs: Knobs, examples: Examples) -> tuple[dict[str, Any], Examples]:
        """All knobs, and the examples with these fields."""
        return {**knobs, **self.knobs}, examples._replace(**self.fields) if self.fields else examples


class Unlearner(NamedTuple):
    """A method on a model, as pure functions of its knobs, so that all settings share a program.

    Attributes:
      method: knobs -> Method.
      init: (knobs, params, examples, forget_set) -> state.
      run: (knobs, params, state, key, examples, forget_share, rows, progress [steps]) -> (params, state,
        record of arrays [steps]).
    """

    method: Callable[[Knobs], Method]
    init: Callable[..., Any]
    run: Callable[..., tuple[Params, Any, dict[str, jax.Array]]]


def momentum(rate: Any) -> optax.GradientTransformation:
    """SGD with momentum 0.9."""
    return optax.sgd(rate, momentum=0.9)


def make_unlearner(
    make: Callable[..., Method],
    losses: LossFunctions,
    *,
    optimizer: Callable[[Any], optax.GradientTransformation] = momentum,
    weight_decay: float = 0.0,
    augmented: Callable[[jax.Array, Examples], Examples] | None = None,
) -> Unlearner:
    """The method of make(losses, optimiser, **knobs) under optimizer(learning rate), one of the knobs.

    `augmented` is (key, examples) -> examples, random and different in every step.
    """

    def method(knobs):
        others = {name: value for name, value in knobs.items() if name != "learning_rate"}
        decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
        return make(losses, optax.chain(decay, optimizer(knobs["learning_rate"])), **others)

    def init(knobs, params, examples, forget_set):
        forget = taken(examples, forget_set)
        nothing = jnp.zeros(len(forget_set))
        return method(knobs).init(params, Batch(forget, forget, nothing, nothing))

    def run(knobs, params, state, key, examples, forget_share, rows, progress):
        step = method(knobs).step

        def one_step(carry, inputs):
            params, state = carry
            rows, progress, key = inputs
            forget, retain = taken(examples, rows.forget), taken(examples, rows.retain)
            if augmented is not None:
                of_forget, of_retain = jax.random.split(key)
                forget, retain = augmented(of_forget, forget), augmented(of_retain, retain)
            params, state, seen = step(params, state, Batch(forget, retain, progress, forget_share))
            return (params, state), seen

        inputs = (rows, progress, jax.random.split(key, len(rows.forget)))
        (params, state), seen = jax.lax.scan(one_step, (params, state), inputs)
        return params, state, seen

    return Unlearner(method, init, run)


def taken(examples: Examples, rows: Any) -> Examples:
    """Those rows of every array."""
    return jax.tree.map(lambda leaf: leaf[rows], examples)


def in_batches(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """All rows once, [k, batch_size], the last batch filled up from the beginning."""
    return np.resize(rows, (-(-len(rows) // batch_size), batch_size)).astype(np.int32)


def make_plan(
    forget: np.ndarray,
    retain: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    independent: bool = False,
) -> Plan:
    """Reshuffled passes over both sets, or retain batches that are drawn independently.

    In passes a batch holds what was not trained on for longest: its loss lies above the whole set's.
    """
    once = in_batches(forget, batch_size)
    if independent:
        of_retain = np.random.default_rng((seed, 6)).choice(retain, (steps, batch_size)).astype(np.int32)
    else:
        of_retain = batch_rows(retain, batch_size, steps, (seed, 6))
    rows = Rows(batch_rows(forget, batch_size, steps, (seed, 5)), of_retain)
    share = np.float32(len(forget) / (len(forget) + len(retain)))
    return Plan(once, rows, np.asarray(share))


def number_of_steps(epochs: int, size: int, batch_size: int) -> int:
    """A multiple of the number of chunks, near `epochs` passes over `size` examples."""
    return max(1, round(epochs * size / batch_size / CHUNKS)) * CHUNKS


class Run(NamedTuple):
    """Unlearned parameters, each step's record as arrays [steps], and seconds without compilation."""

    params: Params
    history: dict[str, np.ndarray]
    seconds: float


def make_unlearn(unlearner: Unlearner) -> Callable[..., Run]:
    """unlearn(knobs, examples, params, plan, seed, report) -> Run."""
    init, run = jax.jit(unlearner.init), jax.jit(unlearner.run, donate_argnums=(1, 2))

    def unlearn(knobs, examples, params, plan: Plan, seed: int, report=lambda part: None) -> Run:
        knobs = in_float32(knobs)
        params = jax.tree.map(jnp.copy, params)
        inputs = (knobs, params, examples, plan.forget_set)
        compiled = init.lower(*inputs).compile()
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(*inputs))
        seconds = time.perf_counter() - start
        steps = len(plan.rows.forget)
        progress = np.arange(steps, dtype=np.float32) / steps
        history = []
        for part in np.split(np.arange(steps), CHUNKS):
            key = jax.random.fold_in(jax.random.key(seed), part[0])
            batches = (plan.forget_share, taken(plan.rows, part), progress[part])
            inputs = (knobs, params, state, key, examples, *batches)
            compiled = run.lower(*inputs).compile()
            start = time.perf_counter()
            params, state, seen = compiled(*inputs)
            history.append(jax.device_get(seen))
            seconds += time.perf_counter() - start
            report(1 / CHUNKS)
        return Run(params, jax.tree.map(lambda *parts: np.concatenate(parts), *history), seconds)

    return unlearn


def make_unlearn_many(unlearner: Unlearner, side_by_side: int = 16) -> Callable[..., Params]:
    """unlearn_many(knobs, params, keys, examples, told, plans) -> params: n models in one compiled call.

    All share the knobs and the examples but for what `told` has of each. `side_by_side` of them are vmapped
    at a time.
    """

    @jax.jit
    def run_many(knobs, params, keys, examples, told: Told, plans: Plan):
        def one(inputs):
            params, key, told, plan = inputs
            own_knobs, own_examples = told.to(knobs, examples)
            state = unlearner.init(own_knobs, params, own_examples, plan.forget_set)
            steps = len(plan.rows.forget)
            progress = jnp.arange(steps, dtype=jnp.float32) / steps
            batches = (plan.forget_share, plan.rows, progress)
            params, _, _ = unlearner.run(own_knobs, params, state, key, own_examples, *batches)
            return params

        return jax.lax.map(one, (params, keys, told, plans), batch_size=min(side_by_side, len(keys)))

    return lambda knobs, *arguments: run_many(in_float32(knobs), *arguments)


def in_float32(knobs: Knobs) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in knobs.items()}
