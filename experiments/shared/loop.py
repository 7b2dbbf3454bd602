"""The loop that runs any unlearning method: paired batches, compiled chunks of steps, one record a step."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared.data.images import Examples
from experiments.shared.methods import Batch, Method, Peer
from experiments.shared.models.classifier import augment, batch_rows

CHUNKS = 10


class Unlearner(NamedTuple):
    """One peer for one classifier, as pure functions of the knobs, so that all of them share a program.

    method(knobs) -> Method.
    init(knobs, params, examples, wrong, forget_rows [k, batch]) -> state.
    run(knobs, params, state, key, examples, wrong, forget_share, rows [steps, 2, batch],
    progress [steps]) -> (params, state, record of arrays [steps]).
    """

    method: Callable[[dict[str, Any]], Method]
    init: Callable[..., Any]
    run: Callable[..., Any]


def momentum(rate: Any) -> optax.GradientTransformation:
    """SGD with momentum 0.9."""
    return optax.sgd(rate, momentum=0.9)


def make_unlearner(
    peer: Peer, apply, *, optimizer=momentum, weight_decay: float = 0.0, augmented: bool = False
) -> Unlearner:
    """Steps optimizer(learning rate); `knobs` holds that rate and the peer's own."""

    def method(knobs):
        rate = knobs["learning_rate"]
        others = {name: value for name, value in knobs.items() if name != "learning_rate"}
        decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
        return peer.make(apply, optax.chain(decay, optimizer(rate)), **others)

    def make_batch(examples: Examples, wrong, forget_share, inputs):
        rows, progress, key = inputs
        forget, retain = examples[rows[0]], examples[rows[1]]
        if augmented:
            keys = jax.random.split(key)
            forget, retain = (
                part._replace(x=augment(k, part.x)) for k, part in zip(keys, (forget, retain), strict=True)
            )
        return Batch(forget, wrong[rows[0]], retain, progress, forget_share)

    def init(knobs, params, examples, wrong, forget_rows):
        forget = examples[forget_rows]
        nothing = jnp.zeros(len(forget_rows))
        batches = Batch(forget, wrong[forget_rows], forget, nothing, nothing)
        return method(knobs).init(params, batches)

    def run(knobs, params, state, key, examples, wrong, forget_share, rows, progress):
        step = method(knobs).step

        def body(carry, inputs):
            batch = make_batch(examples, wrong, forget_share, inputs)
            params, state = carry
            params, state, seen = step(params, state, batch)
            return (params, state), seen

        inputs = (rows, progress, jax.random.split(key, len(rows)))
        (params, state), seen = jax.lax.scan(body, (params, state), inputs)
        return params, state, seen

    return Unlearner(method, init, run)


class Plan(NamedTuple):
    """Which examples each step of a run sees.

    `forget_rows` [k, batch] hold the forget set once (the last batch filled up from its beginning),
    `rows` [steps, 2, batch] a forget and a retain batch for each step; `forget_share` is the forget
    set's share of both sets.
    """

    forget_rows: np.ndarray
    rows: np.ndarray
    forget_share: np.ndarray


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
    batches = -(-len(forget) // batch_size)
    once = np.resize(forget, (batches, batch_size)).astype(np.int32)
    parts = [batch_rows(rows, batch_size, steps, (seed, 5 + i)) for i, rows in enumerate((forget, retain))]
    if independent:
        rng = np.random.default_rng((seed, 6))
        parts[1] = rng.choice(retain, (steps, batch_size)).astype(np.int32)
    share = np.float32(len(forget) / (len(forget) + len(retain)))
    return Plan(once, np.stack(parts, 1), np.asarray(share))


def number_of_steps(epochs: int, size: int, batch_size: int) -> int:
    """A multiple of the number of chunks, near `epochs` passes over `size` examples."""
    return max(1, round(epochs * size / batch_size / CHUNKS)) * CHUNKS


class Run(NamedTuple):
    """Unlearned parameters, each step's record as arrays [steps], and seconds without compilation."""

    params: Any
    history: dict[str, np.ndarray]
    seconds: float


def make_unlearn(unlearner: Unlearner):
    """unlearn(knobs, params, examples, wrong, plan, seed, report) -> Run."""
    init, run = jax.jit(unlearner.init), jax.jit(unlearner.run, donate_argnums=(1, 2))

    def unlearn(knobs, params, examples, wrong, plan: Plan, seed: int, report=lambda part: None) -> Run:
        knobs = {name: jnp.float32(value) for name, value in knobs.items()}
        params = jax.tree.map(jnp.copy, params)
        inputs = (knobs, params, examples, wrong, plan.forget_rows)
        compiled = init.lower(*inputs).compile()
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(*inputs))
        seconds = time.perf_counter() - start
        steps = len(plan.rows)
        progress = np.arange(steps, dtype=np.float32) / steps
        history = []
        for part in np.split(np.arange(steps), CHUNKS):
            key = jax.random.fold_in(jax.random.key(seed), part[0])
            batches = (plan.forget_share, plan.rows[part], progress[part])
            inputs = (knobs, params, state, key, examples, wrong, *batches)
            compiled = run.lower(*inputs).compile()
            start = time.perf_counter()
            params, state, seen = compiled(*inputs)
            history.append(jax.device_get(seen))
            seconds += time.perf_counter() - start
            report(1 / CHUNKS)
        return Run(params, jax.tree.map(lambda *parts: np.concatenate(parts), *history), seconds)

    return unlearn


def make_unlearn_many(unlearner: Unlearner, side_by_side: int = 16):
    """unlearn_many(knobs, params, keys, examples, wrong, plans) -> params: n models in one compiled call.

    `side_by_side` of them are vmapped at a time.
    """

    @jax.jit
    def run_many(knobs, params, keys, examples, wrong, plans: Plan):
        def one(inputs):
            params, key, plan = inputs
            state = unlearner.init(knobs, params, examples, wrong, plan.forget_rows)
            steps = len(plan.rows)
            progress = jnp.arange(steps, dtype=jnp.float32) / steps
            batches = (plan.forget_share, plan.rows, progress)
            return unlearner.run(knobs, params, state, key, examples, wrong, *batches)[0]

        return jax.lax.map(one, (params, keys, plans), batch_size=min(side_by_side, len(keys)))

    def unlearn_many(knobs, params, keys, examples, wrong, plans: Plan):
        knobs = {name: jnp.float32(value) for name, value in knobs.items()}
        return run_many(knobs, params, keys, examples, wrong, plans)

    return unlearn_many
