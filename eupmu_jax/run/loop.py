"""Steps and evaluations in turn: what the host does while the device works."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.method.layouts import owned
from eupmu_jax.method.losses import LossesFn
from eupmu_jax.method.types import PyTree
from eupmu_jax.run.batches import Draw
from eupmu_jax.run.leaves import joined
from eupmu_jax.run.ledger import Best, Ledger
from eupmu_jax.run.plan import Plan
from eupmu_jax.run.processes import ALONE, Processes

Metrics = dict[str, Any]

# The host waits for the device once in so many seconds, steps or bytes of batches: often enough for a
# progress bar, and for an interrupt to lose little, too rarely to be felt.
CHUNK_SECONDS, CHUNK_STEPS, CHUNK_BYTES = 2.0, 100, 2**26
# So many skipped steps in a row and the losses are broken rather than unlucky.
SKIPPED_IN_A_ROW = 50
NEGATIVE = (
    "the forget loss is negative, so that it has no floor: a budget gives it one, a tolerance does not. "
    "Bounded losses are safer: unlikelihood, kl_to_uniform, npo, or cross_entropy to wrong_labels, of "
    "eupmu_jax.objectives"
)


class Inputs(NamedTuple):
    """What a step is given: rows, the leaves that it must not change, and what its key is made from."""

    rows: PyTree
    frozen: PyTree
    key: jax.Array
    step: np.int32


def on_inputs(losses_fn: LossesFn) -> LossesFn:
    """losses_fn as the method calls it: on the trained leaves and `Inputs`."""

    def on_inputs(trained, inputs: Inputs):
        batch = inputs.rows | {"key": jax.random.fold_in(inputs.key, inputs.step)}
        return losses_fn(joined(trained, inputs.frozen), batch)

    return on_inputs


class Hooks(NamedTuple):
    """What a user has given to be called, and how the run's leaves become the user's params."""

    evaluate: Callable[[PyTree], dict[str, float]] | None
    score: Callable[[Metrics], float] | None
    stop: Callable[[Metrics], str | None] | None
    callbacks: Sequence[Callable[[PyTree, Metrics], None]]
    whole: Callable[[PyTree], PyTree]
    on_mesh: Callable[[PyTree], PyTree]
    processes: Processes = ALONE


@contextlib.contextmanager
def _no_interrupt_lost(waits: bool) -> Iterator[Callable[[], None]]:
    """check() raises an interrupt that was lost: in JAX's hook of the garbage collector Python drops it.

    Or, where the first one `waits` for check(), one that would have come within a step that others take, too.
    """
    interrupted = False

    def handler(number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted or not waits:
            interrupted = True
            raise KeyboardInterrupt
        interrupted = True

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_to_the_end(
    ledger: Ledger,
    plan: Plan,
    step: Callable[..., Any],
    batch_at: Draw,
    inputs: Inputs,
    hooks: Hooks,
    show: Callable[[int, dict[str, np.ndarray]], None],
) -> None:
    """Chunks of steps and pauses in turn, to the last step or the first reason to stop."""
    processes = hooks.processes
    with _no_interrupt_lost(waits=processes.count > 1) as check:
        is_pause = lambda: ledger.done % plan.every == 0 or ledger.done == plan.steps
        if is_pause() and ledger.last_evaluation < ledger.done:
            _pause(ledger, hooks)
        # The first chunk compiles, which tells nothing about the next: it is one step, and so is the second.
        length, is_compiled = 1, False
        longest = CHUNK_BYTES // max(1, sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(batch_at(0))))
        while ledger.done < plan.steps and ledger.stopped is None:
            edges = [(ledger.done // size + 1) * size for size in (plan.every, CHUNK_STEPS)]
            end = min(ledger.done + length, plan.steps, *edges)
            start, began = ledger.done, time.perf_counter()
            trouble = _take_steps(ledger, step, processes.drawn(batch_at, range(start, end)), inputs)
            if is_compiled and ledger.done > start:
                seconds = (time.perf_counter() - began) / (ledger.done - start)
                length = max(1, min(int(CHUNK_SECONDS / seconds), longest))
            is_compiled = True
            if trouble is not None and not isinstance(trouble, Exception):
                # Ctrl-C: no evaluation first.
                raise trouble
            check()
            length = min(processes.each(lambda length=length: length))
            show(ledger.done, ledger.seen)
            if start == 0 and ledger.done and ledger.seen["forget_loss"][0] < 0:
                processes.warn(NEGATIVE, stacklevel=4)
            why = None
            # Looked at where it is the same on a fast and on a slow machine.
            if is_pause() or ledger.done % CHUNK_STEPS == 0:
                why = _looks_broken(ledger.seen["skipped_steps"][: ledger.done])
            if why:
                processes.warn(f"stopped after {ledger.done} of {plan.steps} steps: {why}", stacklevel=4)
            if why or (is_pause() and ledger.last_evaluation < ledger.done):
                _pause(ledger, hooks, why)
            if trouble is not None and ledger.stopped is None:
                raise trouble


def _take_steps(
    ledger: Ledger, step: Callable[..., Any], drawn: Iterable[PyTree], inputs: Inputs
) -> BaseException | None:
    """A step for each batch, as far as they go, into the ledger; returns what ended them early."""
    run, trouble = ledger.take(), None
    outputs: list[Any] = [(run.params, run.state, None)]
    try:
        for number, rows in enumerate(drawn, ledger.done):
            given = inputs._replace(rows=rows, step=np.int32(number))
            # One append: an interrupt finds parameters and records of the same step.
            outputs.append(step(*outputs[-1][:2], given))
    except BaseException as error:
        trouble = error
    params, state, _ = outputs[-1]
    if trouble is not None and any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state))):
        # Within the call of a step, which had taken the buffers over already.
        raise trouble
    ledger.give(run._replace(params=params, state=state), [info for _, _, info in outputs[1:]])
    return trouble


def _pause(ledger: Ledger, hooks: Hooks, why: str | None = None) -> None:
    """Evaluates, keeps the best so far, decides whether to go on, saves; `why` is a reason known already."""
    metrics = {"step": ledger.done} | ledger.summary()
    params = hooks.whole(ledger.run.params)
    # Every process calls them, since params may be spread over all; what the first one gets is what counts.
    first = hooks.processes.first
    evaluate, score, stop = hooks.evaluate, hooks.score, hooks.stop
    if evaluate is not None:
        with _after(ledger.done, "evaluate"):
            metrics |= first(lambda: _evaluated(evaluate, params, ledger.seen))
    best = None
    if ledger.done and score is not None:
        with _after(ledger.done, "score"):
            value = first(lambda: float(np.float32(_number(_asked(score, metrics, "score"), "score"))))
        if value > ledger.run.best.score:
            new = Best(jnp.float32(value), jnp.int32(ledger.done), owned(ledger.run.params))
            best = hooks.on_mesh(new)
    if ledger.done and stop is not None:
        with _after(ledger.done, "stop"):
            found = first(lambda: str(_asked(stop, metrics, "stop") or ""))
        why = why or found or None
    ledger.evaluated(metrics | ({"stopped": why} if why else {}), best)
    for callback in hooks.callbacks:
        with _after(ledger.done, "a callback"):
            callback(params, metrics)


@contextlib.contextmanager
def _after(step: int, name: str) -> Iterator[None]:
    """A note on what goes wrong inside: where in the run it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This was in {name}, after {step} steps.")
        raise


def _asked(function: Callable[[Metrics], Any], metrics: Metrics, name: str) -> Any:
    """What `function` makes of the metrics; ValueError that lists them where it asks for another."""
    try:
        return function(metrics)
    except KeyError as error:
        known = ", ".join(metrics)
        raise ValueError(
            f"{name} asks for {error}, but the metrics are {known}: let evaluate return it"
        ) from error


def _number(value: Any, name: str) -> float:
    """`value` as a float; TypeError that names who gave it."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        found = f"an array {np.shape(value)}" if np.shape(value) else repr(value)[:80]
        raise TypeError(f"{name} must return numbers, got {found}") from error


def _evaluated(
    evaluate: Callable[[PyTree], dict[str, float]], params: PyTree, seen: dict[str, np.ndarray]
) -> dict[str, float]:
    """What evaluate returns, as floats; ValueError for names that metrics have already."""
    values = evaluate(params)
    if not isinstance(values, Mapping):
        raise TypeError(f"evaluate must return a dict of numbers by name, got {type(values).__name__}")
    found = {name: _number(value, f"evaluate, of {name!r},") for name, value in values.items()}
    if taken := found.keys() & {"step", "stopped", *seen}:
        raise ValueError(
            f"evaluate returns {', '.join(sorted(taken))}, which the run itself reports: rename it"
        )
    return found


def _looks_broken(skipped: np.ndarray) -> str | None:
    """What to look at where the last steps were all skipped."""
    before = skipped[-SKIPPED_IN_A_ROW - 1] if len(skipped) > SKIPPED_IN_A_ROW else 0
    if len(skipped) < SKIPPED_IN_A_ROW or skipped[-1] - before < SKIPPED_IN_A_ROW:
        return None
    return (
        f"the last {SKIPPED_IN_A_ROW} steps were skipped, for a loss or a gradient was not finite: "
        "look at the labels, the losses (log_losses needs them > 0) and the learning rate"
    )
