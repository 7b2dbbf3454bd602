"""The whole run: batches, steps, evaluation, early stopping, checkpoints, metrics."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from eupmu_jax.method.constraints import (
    Budget,
    Constraint,
    Tolerance,
    check_constraint,
    check_fits,
    check_transformation,
)
from eupmu_jax.method.controller import check_multiplier
from eupmu_jax.method.eupmu import Eupmu, eupmu
from eupmu_jax.method.layouts import owned, place, training_step
from eupmu_jax.method.losses import LossesFn, as_means, check_losses_fn
from eupmu_jax.method.types import Numbers, PyTree
from eupmu_jax.run.batches import (
    Draw,
    RetainSets,
    Sizes,
    forget_source,
    paired,
    rows_of,
    several_source,
)
from eupmu_jax.run.description import constraint_as_data, description, with_saved_baseline
from eupmu_jax.run.folder import Folder, saved_description
from eupmu_jax.run.leaves import by_path, check_numeric, described, joined, parted, rows_not_finite
from eupmu_jax.run.ledger import Best, Ledger, Run
from eupmu_jax.run.loop import Hooks, Inputs, Metrics, on_inputs, run_to_the_end
from eupmu_jax.run.plan import Plan, check_functions, check_places, check_split, kinds, planned
from eupmu_jax.run.processes import Processes, processes_of
from eupmu_jax.run.progress import progress_bar, say_where_it_goes_on
from eupmu_jax.run.promise import (
    HELD_OUT_BATCHES,
    Promise,
    retained,
    rise_on_unseen,
    sets_to_measure,
    verdict,
    within,
)

P = TypeVar("P")


class History(NamedTuple):
    """What a run saw: the second value that `unlearn` returns.

    Attributes:
      steps: by name, an array with one entry for each step ([T] or [T, K]): forget_loss, retain_loss,
        violation, multiplier, skipped_steps, infeasible, as in `SurgeryInfo`.
      evaluations: what ``evaluate`` returned, each with its "step": how many steps were done.
      best_step: the number of steps after which the returned parameters were had, or those that a repair
        brought back within the budget; 0 where the ones that came in are returned.
      stopped: why the run ended before its last step, or None.
      promise: what the budget promised and what was measured, a `Promise`; None for a tolerance, and for
        retain functions without ``measured_on``.

    Example:
      >>> import numpy as np
      >>> import eupmu_jax as eu
      >>> steps = {"retain_loss": np.array([0.2, 0.3])}
      >>> history = eu.History(steps, [], best_step=2, stopped=None, promise=None)
      >>> float(history.steps["retain_loss"][-1])
      0.3
    """

    steps: dict[str, np.ndarray]
    evaluations: list[Metrics]
    best_step: int
    stopped: str | None
    promise: Promise | None


def unlearn(
    losses_fn: LossesFn,
    params: P,
    forget: PyTree | Draw,
    retain: PyTree | Draw,
    inner: optax.GradientTransformation,
    constraint: Constraint,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | tuple[int, Sizes] = 64,
    seed: int = 0,
    trainable: Callable[[str], bool] | None = None,
    initial_multiplier: Numbers = 1.0,
    evaluate: Callable[[P], dict[str, float]] | None = None,
    every: int | None = None,
    score: Callable[[Metrics], float] | None = None,
    stop: Callable[[Metrics], str | None] | None = None,
    callbacks: Sequence[Callable[[P, Metrics], None]] = (),
    folder: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    measured_on: PyTree = None,
    held_out: PyTree = None,
) -> tuple[P, History]:
    r"""A model, a forget set and a retain set in; an unlearned model and what happened out.

    Runs `eupmu` for a number of steps,

    .. math:: \theta_{t+1} = \theta_t + \text{update of } \texttt{eupmu}
       \text{ on } (\text{forget batch}_t, \text{retain batch}_t), \quad t = 0, \dots, T - 1

    each a compiled call that the host does not wait for. Forget examples come in shuffled passes, retain
    batches are drawn independently; both follow from the seed and t alone. With ``folder``, a run that was
    interrupted, even killed, goes on from its last checkpoint when it is started again, and ends with the
    same parameters to the bit. Needs the extra "run" for that folder and for the progress bar.

    Of several processes, joined by ``jax.distributed.initialize`` and with a ``mesh`` of all their devices,
    each gives its own rows: forget, retain, measured_on and held_out are its parts of the sets. It gives an
    equal share of every batch, drawn from its own rows; a function returns the rows of this process. The
    budget is measured on all rows of all processes, each row once, however uneven the parts are. All else is
    given alike to all. Every process calls evaluate, score, stop and callbacks, and what process 0 gets
    counts. Process 0 writes metrics, warns and shows how far the run is. If a process raises, all end within
    a minute and name it. If one dies, JAX ends the others when its heartbeat is missed, by default after 100
    seconds: give ``heartbeat_timeout_seconds=30`` to ``jax.distributed.initialize``.

    In memory are, beside the given params, one copy of the trained leaves, the optimiser's state, and with
    ``score`` one more copy, the best so far; of the frozen leaves there is no copy. A checkpoint that is
    being written has a copy in the host's memory.

    Args:
      losses_fn: pure function (params, batch) -> `Losses`; batch is a dict of "forget" and "retain", rows
        of the sets, and "key", a PRNG key of the step's own for dropout or noise. The forget loss is
        minimised: it must be low when the thing is forgotten (see ``eupmu_jax.objectives``).
      params: pytree of arrays, of Linen or ``nnx.split(model, nnx.Param, ...)``. Leaves that are not
        floating are frozen; close over what should stay, such as batch statistics, or see ``trainable``.
        On a mesh as for `training_step`.
      forget: a pytree of arrays with a leading axis of examples (NumPy, memory-mapped, JAX), or a function
        step -> batch that gives the same batch whenever it is asked for that step.
      retain: likewise; or a list or dict of such sets, of their own lengths, one for each utility: then
        batch["retain"] is a list or dict of their batches, and losses_fn returns a retain loss of shape [K],
        in the order of the list, or of the sorted keys.
      inner: the optimiser, for instance ``optax.adam(1e-4)``.
      constraint: `Budget` or `Tolerance`, as for `eupmu`. The baseline of a budget that has none is the loss
        of the whole retain set before the first step.
      steps, epochs: how long: a number of steps, or of passes over the forget set. One of the two.
      batch_size: rows of the forget and of the retain batch, one number or two; the second may be a list or
        dict, one number for each of several retain sets. Of several processes those of all together.
      seed: of batches and keys.
      trainable: path of a leaf ("layers.0.kernel", as in params.safetensors) -> whether it is trained. The
        other leaves reach losses_fn as they are; they are neither copied nor saved, and run.json has their
        checksum. None: all floating leaves. For NNX filters see ``eupmu_jax.flax.trainable``.
      initial_multiplier: as for `eupmu`; a scalar is taken for all K utilities.
      evaluate: params -> dict of numbers, run on the host every ``every`` steps, at the start and at the end.
      every: steps between evaluations, callbacks and checkpoints; None: a tenth of the steps.
      score: metrics -> number; the parameters with the highest are returned, the earliest of equals. Those
        before the first step and a NaN are no candidates. None: the last ones. Metrics are what evaluate
        returned, "step", the means of forget_loss and retain_loss since the last evaluation, and the latest
        violation, multiplier, skipped_steps and infeasible.
      stop: metrics -> why the run should end now, or None: see `reached`, `exhausted`, `over_forgetting`.
      callbacks: functions (params, metrics), called after each evaluation: plots, other loggers. Before the
        first step metrics has only "step" and what evaluate returned. Copy what you keep of params: the next
        step takes over their memory.
      folder: where metrics.jsonl, checkpoints and the description of the run go; the same one to
        resume, with the same arguments. Sets are compared by a checksum, losses_fn and inner by the
        program that JAX makes of them, unless its version has changed or there is a mesh. None keeps
        nothing on disk. Several processes need it on a file system that they share.
      mesh: as for `training_step`. Of several processes each holds its own part of the first axis; those that
        hold the same part of it, as where one model lies in several processes, give the same rows.
      measured_on: rows like those of retain, on which a budget is measured before and after, where retain is
        a function. Without, nothing is measured then, and the budget starts from the first ten batches.
      held_out: rows like those of retain that nothing is trained on: the rise of the loss there is measured,
        too, with a 95% upper confidence bound. The budget is not enforced on them. Goes with a `Budget`, and
        with retain arrays or measured_on.

    Returns:
      (params, history): params like those given, and a `History`. With ``folder`` they are also in its
      params.safetensors; with ``trainable`` the trained leaves alone.

    Raises:
      TypeError: what `eupmu` raises for its arguments.
      ValueError: an empty set, a batch larger than its set, batches that change shape, neither or both of
        steps and epochs; several retain sets and another number of retain losses; measured_on or held_out
        with a tolerance, or rows that losses_fn does not take; trainable accepts no leaf;
        a folder with another run, a damaged checkpoint; several processes without mesh, or with settings that
        differ. And what `eupmu` raises.
      RuntimeError: a data function that raises, naming the step; the steps before it are done, and kept
        in folder. Another process that raised, naming it.
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
    """
    check_places(folder, mesh)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(processes_of(mesh))
        check_losses_fn(losses_fn)
        check_constraint(constraint)
        check_transformation(inner, "inner")
        check_functions(evaluate=evaluate, score=score, stop=stop, trainable=trainable, callbacks=callbacks)
        plan, sets = planned(steps, epochs, every, batch_size, seed, forget, retain, processes)
        check_split(mesh, forget, plan, sets, processes)
        own_seed, parts = processes.own_seed(plan.seed), processes.parts
        batch_at = paired(
            forget_source(forget, plan.forget_rows // parts, own_seed), several_source(sets, own_seed)
        )
        check_numeric(params, "params")
        if folder is not None:
            by_path(params)
        params = jax.tree.map(jnp.asarray, params)
        trained, frozen = parted(params, trainable)
        processes.check_same(
            **kinds(forget=forget, retain=retain, measured_on=measured_on, held_out=held_out),
            **kinds(evaluate=evaluate, score=score, stop=stop, trainable=trainable, folder=folder),
            plan=plan._asdict(),
            constraint=constraint_as_data(constraint),
            params=described(params),
            batch=described(batch_at(0)),
        )
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        utilities = _utilities(losses_fn, params, batch_at(0), sets)
        check_multiplier(initial_multiplier, isinstance(constraint, Budget))
        check_fits(constraint, initial_multiplier, utilities)
        checked_on, unseen = _sets_to_measure(sets, measured_on, held_out, constraint, plan, processes)
        for name, rows in (("measured_on", checked_on), ("held_out", unseen)):
            if rows is not None and rows is not sets:
                like_retain = batch_at(0) | {"retain": several_source(rows, own_seed)(0)}
                _check_losses(losses_fn, params, like_retain, name, utilities)
        on_mesh = lambda tree: tree if mesh is None else jax.tree.map(partial(place, mesh=mesh), tree)
        # Placed when it is needed: kept on a mesh during the run it would be a copy more.
        original = lambda: on_mesh(parted(params, trainable)[0])
        frozen = on_mesh(frozen)
        for name, data in {"forget": forget, "retain": retain}.items():
            _check_rows(losses_fn, lambda: joined(original(), frozen), batch_at(0), name, data, processes)
        saved = processes.alone(lambda: saved_description(folder))
        constraint = with_saved_baseline(constraint, saved)
        measured = None
        rows = batch_at(0)["forget"]
        if isinstance(constraint, Budget) and checked_on.are_arrays:
            measured = retained(losses_fn, frozen, rows, checked_on, plan.seed, processes)
            if constraint.baseline is None:
                baseline = measured.measure(original())
                if not np.all(np.isfinite(baseline)):
                    raise ValueError(
                        f"the loss of the whole retain set is {baseline} before the first step: look for "
                        "labels that are out of range, and at losses_fn"
                    )
                constraint = dataclasses.replace(constraint, baseline=baseline)
        if np.ndim(initial_multiplier) == 0:
            dtype = getattr(initial_multiplier, "dtype", jnp.float32)
            initial_multiplier = jnp.full(utilities, jnp.asarray(initial_multiplier, dtype))
        tx = eupmu(on_inputs(losses_fn), inner, constraint, initial_multiplier=initial_multiplier)

        step, trained, state = training_step(tx, trained, mesh)
        best = Best(jnp.float32(-jnp.inf), jnp.int32(0), owned(trained) if score else None)
        run = Run(trained, state, on_mesh(best))
        kept = None
        if folder is not None:
            program = None if mesh is not None else _program(tx, run, batch_at(0), frozen)
            model = trained, frozen
            text = description(
                plan,
                constraint,
                initial_multiplier,
                forget,
                sets,
                measured_on,
                model,
                run,
                program,
                processes,
            )
            kept = stack.enter_context(contextlib.closing(Folder(folder, text, processes)))
        whole = lambda trained: joined(trained, frozen)
        hooks = Hooks(evaluate, score, stop, callbacks, whole, on_mesh, processes)
        inputs = Inputs(None, frozen, on_mesh(jax.random.key(plan.seed)), np.int32(0))
        ledger = stack.enter_context(Ledger(run, plan.steps, kept))
        stack.enter_context(processes.telling())
        # Else two copies more, until the end of the run.
        del run, trained, state, best
        if kept is not None and ledger.done and processes.index == 0:
            say_where_it_goes_on(kept.path, ledger.done, plan.steps, ledger.stopped)
        show = stack.enter_context(progress_bar(plan.steps))
        run_to_the_end(ledger, plan, step, batch_at, inputs, hooks, show)

        chosen, best_step = ledger.chosen
        promise = None
        if measured is not None and isinstance(constraint, Budget):
            chosen, promise = within(chosen, measured, constraint, original)
            if promise.way < 1:
                processes.warn(verdict(promise), stacklevel=3)
            if promise.way == 0:
                best_step = 0
            if unseen is not None:
                of = retained(losses_fn, frozen, rows, unseen, plan.seed, processes)
                rises = rise_on_unseen(of.parts(original()), of.parts(chosen))
                promise = promise._replace(held_out_rise=rises[0], held_out_bound=rises[1])
        if kept is not None:
            kept.finish(whole(chosen) if trainable is None else chosen, promise)
        return whole(chosen), History(ledger.steps, ledger.evaluations, best_step, ledger.stopped, promise)


def _program(tx: Eupmu, run: Run, batch: PyTree, frozen: PyTree) -> str:
    """A step as JAX reads it: another loss, optimiser or rate is another program."""
    given = Inputs(batch, frozen, jax.random.key(0), np.int32(0))
    update = lambda state, params: tx.update(None, state, params, batch=given)
    return str(jax.make_jaxpr(update)(run.state, run.params).jaxpr)


def _check_rows(
    losses_fn: LossesFn,
    params: Callable[[], PyTree],
    batch: PyTree,
    name: str,
    data: PyTree | Draw,
    processes: Processes,
) -> None:
    """ValueError that names the rows with NaN or infinity, unless losses_fn masks them."""
    leaves = jax.tree.leaves(data)
    if callable(data) or any(map(callable, leaves)) or len({np.shape(leaf)[:1] for leaf in leaves}) > 1:
        return
    rows = rows_not_finite(data)
    # The losses of the whole batch are asked for by all processes.
    if not any(processes.each(lambda: len(rows))):
        return
    # Beside others, so that a mask leaves something that counts.
    first = rows_of(jax.tree.map(np.asarray, data), rows[:1])
    beside = lambda one, others: np.concatenate([one, others[len(one) :]])
    seen = batch | {name: jax.tree.map(beside, first, batch[name])}
    losses = as_means(losses_fn(params(), processes.rows(seen) | {"key": jax.random.key(0)}))
    if len(rows) and not all(bool(jnp.all(jnp.isfinite(loss))) for loss in losses):
        raise ValueError(
            f"{name} holds NaN or infinity in {len(rows)} of its {len(leaves[0])} rows, of which row "
            f"{rows[0]} is the first, and the losses there are not finite: leave these rows out or mask them"
        )


def _sets_to_measure(
    sets: RetainSets,
    measured_on: PyTree,
    held_out: PyTree,
    constraint: Constraint,
    plan: Plan,
    processes: Processes,
) -> tuple[RetainSets, RetainSets | None]:
    """What a budget is measured on, and what its rise on unseen rows."""
    checked_on = sets
    if isinstance(constraint, Tolerance) and not (measured_on is None and held_out is None):
        raise ValueError("measured_on and held_out go with a Budget: of a Tolerance nothing is promised")
    if measured_on is not None:
        checked_on = sets_to_measure(measured_on, "measured_on", plan, 1, processes)
    if held_out is None:
        return checked_on, None
    if not checked_on.are_arrays:
        raise ValueError("held_out needs retain as arrays, or measured_on: else nothing is measured")
    return checked_on, sets_to_measure(held_out, "held_out", plan, HELD_OUT_BATCHES, processes)


def _check_losses(
    losses_fn: LossesFn, params: PyTree, batch: PyTree, name: str, utilities: tuple[int, ...]
) -> None:
    """ValueError unless losses_fn takes rows of that name as it takes those of retain."""
    try:
        shape = _retain_shape(losses_fn, params, batch)
    except Exception as error:
        raise ValueError(
            f"{name} must hold rows like those of retain, which losses_fn takes: {error}"
        ) from error
    if shape != utilities:
        raise ValueError(f"{name} gives a retain loss of shape {shape}, retain one of {utilities}")


def _utilities(losses_fn: LossesFn, params: PyTree, batch: PyTree, sets: RetainSets) -> tuple[int, ...]:
    """The shape of the retain loss, () or (K,)."""
    shape = _retain_shape(losses_fn, params, batch)
    if len(sets.sets) > 1 and shape != (len(sets.sets),):
        raise ValueError(
            f"retain holds {len(sets.sets)} sets, one for each utility, so that losses_fn must return a "
            f"retain loss of shape ({len(sets.sets)},), got {shape}; arrays of one set have one length"
        )
    return shape


def _retain_shape(losses_fn: LossesFn, params: PyTree, batch: PyTree) -> tuple[int, ...]:
    batch = batch | {"key": jax.random.key(0)}
    return jax.eval_shape(lambda p, b: as_means(losses_fn(p, b)).retain, params, batch).shape
