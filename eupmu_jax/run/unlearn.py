"""The whole run: batches, compiled chunks of steps, evaluation, early stopping, checkpoints, metrics."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eupmu_jax.method.constraints import Budget, Constraint
from eupmu_jax.method.eupmu import eupmu
from eupmu_jax.method.layouts import owned, place, split
from eupmu_jax.method.losses import LossesFn, Mean, check_losses_fn
from eupmu_jax.method.state import surgery_info
from eupmu_jax.run import batches
from eupmu_jax.run.batches import check_numeric, described
from eupmu_jax.run.folder import Folder, by_path, read_description
from eupmu_jax.run.progress import progress_bar

# A chunk is one compiled scan: long enough to keep the host out of the way, short enough to hold its batches.
CHUNK_STEPS, CHUNK_BYTES = 100, 2**26
# So many skipped steps in a row and the losses are broken rather than unlucky.
SKIPPED_IN_A_ROW = 50


class History(NamedTuple):
    """What a run saw: the second value that `unlearn` returns.

    Args:
      steps: by name, an array with one entry for each step ([T] or [T, K]): forget_loss, retain_loss,
        violation, multiplier, skipped_steps, infeasible, as in `SurgeryInfo`.
      evaluations: what ``evaluate`` returned, each with its "step": how many steps were done.
      best_step: the number of steps after which the returned parameters were had.
      stopped: why the run ended before its last step, or None.

    Source: ours.
    """

    steps: dict[str, np.ndarray]
    evaluations: list[dict[str, Any]]
    best_step: int
    stopped: str | None


def unlearn(
    losses_fn: LossesFn,
    params: Any,
    forget: Any,
    retain: Any,
    inner: optax.GradientTransformation,
    constraint: Constraint,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | tuple[int, int] = 64,
    seed: int = 0,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    every: int | None = None,
    score: Callable[[dict[str, Any]], float] | None = None,
    stop: Callable[[dict[str, Any]], str | None] | None = None,
    callbacks: Sequence[Callable[[Any, dict[str, Any]], None]] = (),
    folder: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    initial_multiplier: Any = 1.0,
) -> tuple[Any, History]:
    r"""A model, a forget set and a retain set in; an unlearned model and what happened out.

    Runs `eupmu` for a number of steps,

    .. math:: \theta_{t+1} = \theta_t + \text{update of } \texttt{eupmu}
       \text{ on } (\text{forget batch}_t, \text{retain batch}_t), \quad t = 0, \dots, T - 1

    in compiled chunks. Forget examples come in shuffled passes, retain batches are drawn independently;
    both follow from the seed and t alone. With ``folder``, a run that was interrupted, even killed,
    goes on from its last checkpoint when it is started again, and ends with the same parameters
    to the bit. Needs the extra "run" for that folder and for the progress bar.

    Args:
      losses_fn: pure function (params, batch) -> `Losses`; batch is a dict of "forget" and "retain", rows
        of the two sets, and "key", a PRNG key of the step's own for dropout or noise.
      params: pytree of arrays, of Linen or ``nnx.split(model, nnx.Param, ...)``. Leaves that are not
        floating are frozen; they reach losses_fn as they are. All others are trained: close over what
        should stay, such as batch statistics. On a mesh as for `training_step`.
      forget, retain: a pytree of arrays with a leading axis of examples (NumPy, memory-mapped, JAX),
        or a function step -> batch that gives the same batch whenever it is asked for that step.
      inner: the optimiser, for instance ``optax.adam(1e-4)``.
      steps, epochs: how long: a number of steps, or of passes over the forget set. One of the two.
      batch_size: rows of the forget and of the retain batch, one number or two.
      seed: of batches and keys.
      evaluate: params -> dict of numbers, run on the host every ``every`` steps, at the start and at the end.
      every: steps between evaluations, callbacks and checkpoints; None: a tenth of the steps.
      score: metrics -> number; the parameters with the highest are returned, the earliest of equals. Those
        before the first step and a NaN are no candidates. None: the last ones. Metrics are what evaluate
        returned, "step", and the latest forget_loss, retain_loss, violation, multiplier, skipped_steps
        and infeasible.
      stop: metrics -> why the run should end now, or None: see `reached`, `exhausted`, `over_forgetting`.
      callbacks: functions (params, metrics), called after each evaluation: plots, other loggers. Copy
        what you keep of params: the next step takes over their memory.
      folder: where metrics.jsonl, checkpoints and the description of the run go; the same one to
        resume, with the same arguments (compared, but for what functions and inner do). None keeps
        nothing on disk.
      mesh: as for `training_step`, of one process.
      **settings: of `eupmu`: budget, retain_baseline, tolerance, measure, ... A budget without a
        baseline gets the loss of the whole retain set before the first step, and a multiplier for each
        of its utilities.

    Returns:
      (params, history): params like those given, and a `History`.

    Raises:
      TypeError: what `eupmu` raises for its arguments.
      ValueError: an empty set, a batch larger than its set, batches that change shape, neither or both of
        steps and epochs; a folder with another run, a damaged checkpoint. And what `eupmu` raises.
      RuntimeError: a data function that raises, naming the step; the steps before it are done, and kept
        in folder.
      OSError: a checkpoint that cannot be written; the last good one is kept.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import eupmu_jax as eu
      >>> def losses_fn(x, batch):
      ...     return eu.Losses(jnp.mean((x - batch["forget"]) ** 2), jnp.mean((x - batch["retain"]) ** 2))
      >>> forget, retain = np.full(50, 2.0, np.float32), np.zeros(200, np.float32)
      >>> x, history = eu.unlearn(
      ...     losses_fn, jnp.array(0.0), forget, retain, optax.sgd(0.02), eu.Budget(0.25),
      ...     steps=300, batch_size=10)
      >>> bool(abs(x**2 - 0.25) < 0.02), history.stopped, history.steps["retain_loss"].shape
      (True, None, (300,))

    Source: ours.
    """
    check_losses_fn(losses_fn)
    check_functions(evaluate=evaluate, score=score, stop=stop, callbacks=callbacks)
    check_whole(seed, "seed", least=0)
    sizes = tuple(batch_size) if isinstance(batch_size, tuple | list) else (batch_size, batch_size)
    if len(sizes) != 2:
        raise ValueError(f"batch_size must be one or two whole numbers, got {batch_size!r}")
    for size in sizes:
        check_whole(size, "batch_size")
    seed, sizes = int(seed), tuple(map(int, sizes))
    steps = number_of_steps(steps, epochs, forget, sizes[0])
    every = max(1, steps // 10) if every is None else every
    check_whole(every, "every")
    every = int(every)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {type(mesh).__name__}")
    if jax.process_count() > 1:
        raise ValueError("unlearn runs in one process: use training_step where there are several")
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path or None, got {type(folder).__name__}")
    draw = batches.source(forget, "forget", sizes[0], seed), batches.source(retain, "retain", sizes[1], seed)
    stacked = batches.paired(*draw)

    check_numeric(params, "params")
    params = jax.tree.map(jnp.asarray, params)
    free, frozen = parted(params)
    if folder is not None:
        by_path(params)
    settings = {"constraint": constraint}
    if isinstance(constraint, Budget) and constraint.baseline is None and not callable(retain):
        # Measured anew, on another machine say, it would differ in the last bit.
        baseline = saved_settings(folder).get("retain_baseline")
        if baseline is None:
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                args = losses_fn, params, draw[0](0), retain, sizes[1], seed
                baseline = whole_retain_loss(*args)
        settings["retain_baseline"] = np.asarray(baseline)
        constraint = dataclasses.replace(constraint, baseline=np.asarray(baseline))
        initial_multiplier = jnp.ones(np.shape(baseline))
    tx = eupmu(
        lambda free, inputs: losses_fn(joined(free, inputs[1]), inputs[0]),
        inner,
        constraint,
        initial_multiplier=initial_multiplier,
    )

    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))

        def on_mesh(tree):
            return tree if mesh is None else jax.tree.map(partial(place, mesh=mesh), tree)

        free, frozen = owned(on_mesh(free)), on_mesh(frozen)
        best = {
            "score": jnp.float32(-jnp.inf),
            "step": jnp.int32(0),
            "params": owned(free) if score else None,
        }
        run = Run(free, owned(on_mesh(tx.init(free))), on_mesh(best))
        done, seen, evaluations, book = 0, empty_records(run.state, steps), [], None
        if folder is not None:
            plan = {"steps": steps, "every": every, "batch_size": sizes, "seed": seed}
            book = Folder(
                folder, description(run, {"forget": forget, "retain": retain}, params, settings, plan)
            )
            stack.callback(book.close)
            done, run, lines = book.restore(run)
            evaluations = read_lines(lines, seen)
        stopped = evaluations[-1].get("stopped") if evaluations else None
        run_chunk = chunk_runner(tx, run, mesh)
        show = stack.enter_context(progress_bar(steps))

        def pause(run: Run, why: str | None = None) -> Run:
            """Evaluates, keeps the best so far, decides whether to go on, saves."""
            metrics = {"step": done} | summary(seen, evaluations[-1]["step"] if evaluations else 0, done)
            params = joined(run.params, frozen)
            if evaluate is not None:
                metrics |= evaluated(evaluate, params, seen)
            if done and score is not None and (value := np.float32(score(metrics))) > run.best["score"]:
                best = {"score": jnp.float32(value), "step": jnp.int32(done), "params": owned(run.params)}
                run = run._replace(best=on_mesh(best))
            if done and stop is not None:
                why = why or stop(metrics) or None
            nonlocal at_rest
            at_rest = False
            evaluations.append(metrics | ({"stopped": why} if why else {}))
            if book is not None:
                book.write([{"step": done, "evaluation": evaluations[-1]}])
                if done:
                    book.save(done, run)
            at_rest = True
            for callback in callbacks:
                callback(params, metrics)
            return run

        first = stacked(0, 1)
        if first.trouble is not None:
            raise first.trouble
        edges = chunk_edges(steps, every, first.rows)
        following = lambda step: int(edges[np.searchsorted(edges, step, "right")])
        is_pause = lambda: done % every == 0 or done == steps
        # Whether `run`, `done` and the metrics on disk are of the same step.
        at_rest = True
        try:
            if is_pause() and (not evaluations or evaluations[-1]["step"] < done):
                run = pause(run)
                stopped = evaluations[-1].get("stopped")
            ahead = stacked(done, following(done)) if done < steps and stopped is None else None
            while done < steps and stopped is None and ahead is not None:
                rows, amount, trouble = ahead
                if amount:
                    end, inputs = done + amount, split_rows(rows, mesh)
                    numbers, at_rest = jnp.arange(done, end), False
                    carry, infos = run_chunk(run[:2], frozen, jax.random.key(seed), numbers, inputs)
                    run = run._replace(params=carry[0], state=carry[1])
                    if end < steps and trouble is None:
                        # While the device is busy.
                        ahead = stacked(end, following(end))
                    record(infos, seen, done)
                    if book is not None:
                        book.write(step_lines(seen, done, end))
                    done, at_rest = end, True
                    show(done, seen)
                    if why := looks_broken(seen["skipped_steps"][:done]):
                        warnings.warn(f"stopped after {done} of {steps} steps: {why}", stacklevel=2)
                    if why or is_pause():
                        run = pause(run, why)
                        stopped = evaluations[-1].get("stopped")
                if trouble is not None and stopped is None:
                    raise trouble
        except BaseException:
            # Data, a score or a user that ends the run: what was done until then is kept.
            if book is not None and at_rest:
                book.save_if_new(done, run)
            raise
        taken = run.best["params"] if score is not None and np.isfinite(run.best["score"]) else run.params
        best_step = int(run.best["step"]) if taken is not run.params else done
        params = joined(taken, frozen)
        if book is not None:
            book.export(params)
    return params, History(
        {name: values[:done] for name, values in seen.items()}, evaluations, best_step, stopped
    )


class Run(NamedTuple):
    """What a checkpoint holds: everything that the rest of a run depends on, but for the data."""

    params: Any
    state: Any
    best: dict[str, Any]


def saved_settings(folder: str | os.PathLike | None) -> dict[str, Any]:
    """The settings of the run in a folder, if there is one."""
    description = None if folder is None else pathlib.Path(folder) / "run.json"
    if description is None or not description.exists():
        return {}
    return read_description(description).get("settings", {})


def check_whole(value: Any, name: str, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def check_functions(callbacks: Any, **functions: Any) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function or None, got {function!r}")
    if not isinstance(callbacks, list | tuple) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks must be a list of functions (params, metrics), got {callbacks!r}")


def number_of_steps(steps: int | None, epochs: float | None, forget: Any, batch_size: int) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError("give steps or epochs, one of the two")
    if epochs is not None:
        if callable(forget):
            raise ValueError("epochs needs forget as arrays: a function has no known length, give steps")
        if not isinstance(epochs, int | float) or not 0 < epochs < np.inf:
            raise ValueError(f"epochs must be a number > 0, got {epochs!r}")
        steps = int(np.ceil(epochs * batches.check_set(forget, "forget", batch_size) / batch_size))
    check_whole(steps, "steps")
    assert steps is not None
    return int(steps)


def parted(params: Any) -> tuple[Any, Any]:
    """The floating leaves, to be trained, and the others, with None where the other has a leaf."""
    if not jax.tree.leaves(params):
        raise TypeError("params has no leaves: there is nothing to unlearn")
    is_free = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    free = jax.tree.map(lambda leaf: leaf if is_free(leaf) else None, params)
    if not jax.tree.leaves(free):
        raise TypeError("params has no floating-point leaf: there is nothing to unlearn")
    return free, jax.tree.map(lambda leaf: None if is_free(leaf) else leaf, params)


def joined(free: Any, frozen: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, free, frozen, is_leaf=lambda node: node is None)


def whole_retain_loss(losses_fn, params, forget_batch, retain, batch_size: int, seed: int) -> np.ndarray:
    """R of the whole retain set, in batches; each Mean by its count, anything else by the rows it has."""
    key = jax.random.key(seed)

    @jax.jit
    def sum_and_count(params, forget_batch, rows, index):
        batch = {"forget": forget_batch, "retain": rows, "key": jax.random.fold_in(key, index)}
        part = losses_fn(params, batch).retain
        if not isinstance(part, Mean):
            amount = jax.tree.leaves(rows)[0].shape[0]
            part = Mean(part * amount, amount)
        return jnp.asarray(part.total, jnp.float32), jnp.asarray(part.count, jnp.float32)

    length = batches.check_set(retain, "retain", batch_size)
    total, count = np.float64(0), np.float64(0)
    for index, start in enumerate(range(0, length, batch_size)):
        rows = jax.tree.map(lambda leaf: np.asarray(leaf[start : start + batch_size]), retain)  # noqa: B023
        parts = sum_and_count(params, forget_batch, rows, index)
        total, count = total + np.asarray(parts[0], np.float64), count + np.asarray(parts[1], np.float64)
    return np.asarray(total / count, np.float32)


def chunk_edges(steps: int, every: int, first: Any) -> np.ndarray:
    """Where chunks end: at every pause, and in between in nearly equal parts that fit the memory."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    longest = int(np.clip(CHUNK_BYTES // max(size, 1), 1, CHUNK_STEPS))
    pauses = [*range(0, steps, every), steps]
    parts = [
        np.linspace(start, end, -(-(end - start) // longest) + 1).round().astype(int)[1:]
        for start, end in itertools.pairwise(pauses)
    ]
    return np.concatenate(parts)


def chunk_runner(tx: optax.GradientTransformationExtraArgs, run: Run, mesh: Mesh | None):
    """One compiled scan over the steps of a chunk; parameters and state are donated."""

    def run_chunk(carry, frozen, key, steps, rows):
        def one_step(carry, inputs):
            (params, state), (step, batch) = carry, inputs
            batch = batch | {"key": jax.random.fold_in(key, step)}
            updates: Any = None
            updates, state = tx.update(updates, state, params, batch=(batch, frozen))
            return (optax.apply_updates(params, updates), state), surgery_info(state)._asdict()

        return jax.lax.scan(one_step, carry, (steps, rows))

    if mesh is None:
        return jax.jit(run_chunk, donate_argnums=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tuple(run[:2]))
    return jax.jit(run_chunk, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))


def split_rows(rows: Any, mesh: Mesh | None) -> Any:
    """A chunk's batches, their rows (the second axis) along the first axis of the mesh."""
    return rows if mesh is None else split(rows, P(None, mesh.axis_names[0]), mesh)


def empty_records(state: Any, steps: int) -> dict[str, np.ndarray]:
    """For every step what surgery_info says."""
    info = surgery_info(state)._asdict()
    return {name: np.zeros((steps, *value.shape), value.dtype) for name, value in info.items()}


def evaluated(evaluate: Callable[[Any], dict[str, float]], params: Any, seen: Any) -> dict[str, float]:
    """What evaluate returns, as floats; ValueError for names that metrics have already."""
    found = {name: float(value) for name, value in evaluate(params).items()}
    if taken := found.keys() & {"step", "stopped", *seen}:
        raise ValueError(
            f"evaluate returns {', '.join(sorted(taken))}, which the run itself reports: rename it"
        )
    return found


def record(infos: dict[str, jax.Array], seen: dict[str, np.ndarray], start: int) -> None:
    for name, values in jax.device_get(infos).items():
        seen[name][start : start + len(values)] = values


def step_lines(seen: dict[str, np.ndarray], start: int, end: int):
    for i in range(start, end):
        yield {"step": i + 1} | {name: values[i].tolist() for name, values in seen.items()}


def read_lines(lines, seen: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Fills `seen` with the steps of metrics.jsonl and returns its evaluations."""
    evaluations = []
    for line in lines:
        if "evaluation" in line:
            evaluations.append(line["evaluation"])
            continue
        for name, values in seen.items():
            values[line["step"] - 1] = line[name]
    return evaluations


def summary(seen: dict[str, np.ndarray], since: int, done: int) -> dict[str, Any]:
    """Means of the losses since the last pause, and the latest of all else; nothing before the first step."""
    if done == 0:
        return {}
    means = {
        name: seen[name][min(since, done - 1) : done].mean(0).tolist()
        for name in ("forget_loss", "retain_loss")
    }
    return {name: means.get(name, values[done - 1].tolist()) for name, values in seen.items()}


def looks_broken(skipped: np.ndarray) -> str | None:
    before = skipped[-SKIPPED_IN_A_ROW - 1] if len(skipped) > SKIPPED_IN_A_ROW else 0
    if len(skipped) < SKIPPED_IN_A_ROW or skipped[-1] - before < SKIPPED_IN_A_ROW:
        return None
    return (
        f"the last {SKIPPED_IN_A_ROW} steps were skipped, for a loss or a gradient was not finite: "
        "look at the labels, the losses (log_losses needs them > 0) and the learning rate"
    )


def description(
    run: Run, data: dict[str, Any], params: Any, settings: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same for a run to go on, as far as it can be compared: run.json."""

    def plain(value):
        if callable(value) or isinstance(value, optax.GradientTransformation):
            return getattr(value, "__qualname__", type(value).__name__)
        if dataclasses.is_dataclass(value):
            return repr(value)
        return value if isinstance(value, str | bool | None) else np.asarray(value).tolist()

    def sketch(part):
        if callable(part):
            return "function"
        some = np.linspace(0, len(jax.tree.leaves(part)[0]) - 1, 1024).round().astype(int)
        return described(part) | {"crc32 of 1024 rows": checksum(jax.tree.map(lambda leaf: leaf[some], part))}

    return {
        **plan,
        "settings": {name: plain(value) for name, value in sorted(settings.items())},
        **{name: sketch(part) for name, part in data.items()},
        "crc32 of params": checksum(params),
        "checkpoint": described(run),
    }


def checksum(tree: Any) -> int:
    """crc32 of all leaves, one after the other."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total
