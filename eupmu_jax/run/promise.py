"""What a budget promised and what came of it: measured on the whole retain set, and repaired."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.method.constraints import Budget
from eupmu_jax.method.losses import LossesFn, Mean
from eupmu_jax.method.types import PyTree
from eupmu_jax.run.batches import (
    RetainSets,
    check_set,
    in_order,
    lengths_of,
    passes_over,
    retain_sets,
    several_source,
)
from eupmu_jax.run.leaves import joined
from eupmu_jax.run.plan import Plan
from eupmu_jax.run.processes import ALONE, Processes
from eupmu_jax.run.progress import live_bar

# A repair aims a little below the budget, since the loss is no line; one step nearly always does.
AIM, MOST_REPAIRS = 0.97, 10
# Where these do not suffice, so many halvings find how far back towards what came in is far enough.
HALVINGS = 6
# Rows of the retain set from which the gradient of a repair is taken.
REPAIR_ROWS = 1024
# Batches that are measured before the host waits for the first of them.
AHEAD = 8
# Batches that a bound on unseen data is made of, where there are as many rows.
HELD_OUT_BATCHES = 32


class Promise(NamedTuple):
    """What a budget promised and what was measured: on all rows of the retain set, before and after.

    Attributes:
      baseline: R_0, float64 [] or [K], in the loss's units.
      budget: delta, likewise.
      rise: R - R_0 of the returned parameters, likewise; <= budget where it holds.
      share: rise / budget.
      examples: rows of the retain set, or sets, that this was measured on.
      repair_steps: how many steps it took to bring the loss back within the budget, at most 10.
      holds: whether the unlearned parameters are within their budget. False: the returned ones are those that
        came in, unchanged: nothing is forgotten and nothing lost.
      held_out_rise: the rise on held-out rows, [] or [K], or None where there are none.
      held_out_bound: its 95% upper confidence bound, likewise; a budget is not enforced there.
      way: how far the returned parameters are on the straight way from those that came in to the unlearned
        ones, in [0, 1]. Below 1 where the repair steps did not suffice.

    Example:
      >>> import numpy as np
      >>> import eupmu_jax as eu
      >>> numbers = (np.array(1.2), np.array(0.1), np.array(0.097), np.array(0.97))
      >>> promise = eu.Promise(*numbers, examples=5400, repair_steps=1, holds=True)
      >>> eu.verdict(promise)
      'The retain loss rose by 0.097 of the 0.1 you allowed (measured on 5,400 examples).'
    """

    baseline: np.ndarray
    budget: np.ndarray
    rise: np.ndarray
    share: np.ndarray
    examples: int
    repair_steps: int
    holds: bool
    held_out_rise: np.ndarray | None = None
    held_out_bound: np.ndarray | None = None
    way: float = 1.0


def verdict(promise: Promise | None, names: Sequence[str] = ()) -> str:
    """What was promised and what was spent, in a sentence.

    Args:
      promise: of a `History`.
      names: of its utilities, in their order; without them they have numbers.

    Returns:
      The sentence; for None, that nothing was measured and why.

    Raises:
      ValueError: not as many names as utilities.

    Example:
      >>> import eupmu_jax as eu
      >>> eu.verdict(None)
      'Nothing was promised: there is no budget, or no retain arrays to measure it on.'
    """
    if promise is None:
        return "Nothing was promised: there is no budget, or no retain arrays to measure it on."
    of = f"(measured on {promise.examples:,} examples)"
    if not promise.holds:
        return (
            f"The budget could not be kept {of}: the parameters are those that came in, and nothing is "
            "forgotten. Lower the learning rate, raise the budget, or take a bounded forget loss."
        )
    if promise.way < 1:
        of += f". The last steps went too far: this is {promise.way:.0%} of the way to where they led"
    worst = int(np.argmax(promise.share))
    rise, budget = np.ravel(promise.rise)[worst], np.ravel(promise.budget)[worst]
    moved = f"rose by {rise:.3g} of the {budget:.3g} you allowed"
    if rise < 0:
        moved = f"fell by {-rise:.3g}; you allowed a rise of {budget:.3g}"
    if np.size(promise.share) == 1:
        return f"The retain loss {moved} {of}."
    numbers = [f"number {i + 1}" for i in range(np.size(promise.share))]
    if names and len(names) != len(numbers):
        raise ValueError(f"names: {len(names)} for {len(numbers)} utilities, got {list(names)}")
    nearest = f"{(names or numbers)[worst]}, the nearest to its budget, {moved}"
    return f"All {np.size(promise.share)} retain losses kept their budgets; {nearest} {of}."


class Retained(NamedTuple):
    """The retain losses of one set, or several, as functions of the trained leaves, compiled once.

    Attributes:
      parts: trained -> (totals, counts) of all batches, float64 [batches] or [batches, K].
      gradients: (trained, weights like R, step) -> that of <weights, R> on each half of about 1,024 rows.
      examples: how many rows there are.
    """

    parts: Callable[[PyTree], tuple[np.ndarray, np.ndarray]]
    gradients: Callable[[PyTree, np.ndarray, int], tuple[PyTree, PyTree]]
    examples: int

    def measure(self, trained: PyTree) -> np.ndarray:
        """R of all rows, float64 [] or [K]."""
        totals, counts = self.parts(trained)
        return np.asarray(totals.sum(0) / counts.sum(0))


def retained(
    losses_fn: LossesFn,
    frozen: PyTree,
    forget_batch: PyTree,
    retain: RetainSets,
    seed: int,
    processes: Processes = ALONE,
) -> Retained:
    """Of all rows in batches, each Mean by its count, anything else by the rows it has.

    With a set for each utility, utility k is the mean over set k. Of several processes each gives its own
    rows, and all get what is true of all of them.
    """
    key, draw = jax.random.key(seed), several_source(retain, processes.own_seed(seed))
    forget_batch = processes.rows(forget_batch)
    lengths = lengths_of(retain, processes)
    passes = passes_over(lengths, retain.sizes)
    # Of each half of the rows; both together are one pass over small sets.
    rows = processes.parts * min(retain.sizes.values())
    batches = min(-(-passes // 2), -(-REPAIR_ROWS // (2 * rows)))

    def sum_and_count(trained, frozen, forget_batch, rows, index, amounts):
        # The same key before and after: noise and dropout are then the same, too.
        batch = {"forget": forget_batch, "retain": rows, "key": jax.random.fold_in(key, index)}
        part = losses_fn(joined(trained, frozen), batch).retain
        if not isinstance(part, Mean):
            part = Mean(part * amounts, amounts)
        # Of a set that is through, the batch is there for the shape alone.
        count = jnp.where(amounts > 0, part.count, 0)
        wide = lambda numbers: numbers.astype(jnp.promote_types(numbers.dtype, jnp.float32))
        return wide(jnp.where(amounts > 0, part.total, 0)), wide(count)

    def weighted(trained, frozen, forget_batch, rows, index, weights):
        ones = jnp.ones_like(weights)
        total, count = sum_and_count(trained, frozen, forget_batch, rows, index, ones)
        return jnp.sum(weights * total / count)

    compiled = jax.jit(sum_and_count, **processes.everywhere)
    slope = jax.jit(jax.grad(weighted))

    def parts(trained: PyTree) -> tuple[np.ndarray, np.ndarray]:
        found = []
        with live_bar(passes) as show:
            for index, (rows, amounts) in enumerate(in_order(retain, processes)):
                amounts = amounts.astype(np.float32) if len(amounts) > 1 else np.float32(amounts[0])
                found.append(compiled(trained, frozen, forget_batch, rows, index, amounts))
                # The device is kept busy, and holds few batches at once.
                jax.block_until_ready(found[max(0, index - AHEAD)])
                show(index + 1, "measuring the retain loss")
        found = jax.device_get(found)
        totals, counts = (np.stack(part).astype(np.float64) for part in zip(*found, strict=True))
        return totals, np.broadcast_to(
            counts.reshape(passes, -1), totals.shape
        ) if totals.ndim > 1 else counts

    def gradient(trained: PyTree, weights: np.ndarray, first: int) -> PyTree:
        mean = None
        for index in range(first, first + batches):
            part = slope(trained, frozen, forget_batch, processes.rows(draw(index)), index, weights)
            mean = _shared(part, batches) if mean is None else _added(mean, part, batches)
        return mean

    def gradients(trained: PyTree, weights: np.ndarray, step: int) -> tuple[PyTree, PyTree]:
        halves = (2 * step * batches, (2 * step + 1) * batches)
        first, second = (gradient(trained, weights, half) for half in halves)
        return first, second

    return Retained(parts, gradients, sum(sum(part.values()) for part in lengths))


@partial(jax.jit, static_argnums=1)
def _shared(part: PyTree, batches: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf / batches, part)


@partial(jax.jit, static_argnums=2)
def _added(mean: PyTree, part: PyTree, batches: int) -> PyTree:
    return jax.tree.map(lambda a, b: a + b / batches, mean, part)


def within(
    trained: PyTree, of: Retained, constraint: Budget, original: Callable[[], PyTree]
) -> tuple[PyTree, Promise]:
    r"""The parameters brought back within their budget, and what was measured; as far as that goes.

    Where a utility is over its budget, Polyak's step along the excesses over 97%, in shares s_k of the
    budgets,

    .. math:: E = \sum_k (s_k - 0.97)_+, \qquad \theta \leftarrow \theta - \frac{E}{|\nabla E|^2} \nabla E

    which would end there if the loss were a line; then everything is measured again. A step that made
    it worse is taken back, and half as long the next time. What ten steps do not bring back is moved towards
    the parameters that came in, by the least of 64 equal parts of the way that is found to suffice.
    """
    baseline, total = (np.asarray(numbers, float) for numbers in (constraint.baseline, constraint.total))
    rise_of = lambda trained: of.measure(trained) - baseline
    promised = lambda rise, steps, holds, way: Promise(
        baseline, total + 0 * rise, rise, rise / total, of.examples, steps, holds, way=way
    )
    best, least, length, slope, steps = trained, np.inf, 1.0, None, 0
    over = np.zeros(np.shape(baseline + total), bool)
    for steps in range(MOST_REPAIRS + 1):
        rise = rise_of(trained)
        share = rise / total
        if np.all(share <= 1):
            return trained, promised(rise, steps, True, 1.0)
        excess = np.sum(np.maximum(share - AIM, 0))
        if slope is None and not np.isfinite(excess):
            break
        # Where other utilities are over now, the step did what it was to do for those that were.
        is_better = np.isfinite(excess) and (excess < least or np.any((share > AIM) != over))
        if is_better:
            best, least, over, length = trained, excess, share > AIM, min(1.0, 2 * length)
        else:
            length /= 2
        if steps == MOST_REPAIRS:
            break
        if is_better:
            slope = of.gradients(best, (np.asarray(over) / total).astype(np.float32), steps)
        trained = _polyak(best, slope, jnp.float32(length * least))
    start, way, found = original(), 0.0, None
    if np.isfinite(least):
        for halving in range(1, HALVINGS + 1):
            further = way + 0.5**halving
            rise = rise_of(_between(start, best, jnp.float32(further)))
            if np.all(rise <= total):
                way, found = further, rise
    if found is None:
        return start, promised(rise_of(start), steps, False, 0.0)
    return _between(start, best, jnp.float32(way)), promised(found, steps, True, way)


@jax.jit
def _between(start: PyTree, end: PyTree, way: jax.Array) -> PyTree:
    wide = lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    part = lambda a, b: (wide(a) + way * (wide(b) - wide(a))).astype(a.dtype)
    return jax.tree.map(part, start, end)


@jax.jit
def _polyak(trained: PyTree, slopes: tuple[PyTree, PyTree], excess: jax.Array) -> PyTree:
    def product(a, b):
        wide = lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32)
        products = jax.tree.map(lambda x, y: jnp.vdot(x, y, preferred_element_type=wide(x)), a, b)
        return jax.tree.reduce(jnp.add, products)

    slope = jax.tree.map(lambda a, b: (a + b) / 2, *slopes)
    # The square of a mean of few rows holds their noise, which would make the step too short: the product of
    # two independent ones does not. It may come out near 0, where the noise is all there is.
    square = product(slope, slope)
    square = jnp.maximum(product(*slopes), square / 4)
    length = jnp.where(square > 0, excess / jnp.where(square > 0, square, 1), 0)
    return jax.tree.map(lambda leaf, g: leaf - (length * g).astype(leaf.dtype), trained, slope)


def rise_on_unseen(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]):
    """The mean rise, [] or [K], of losses in batches, and its 95% upper confidence bound by Student's t.

    The bound takes the batches for independent draws; it is infinite where there is one alone.
    """
    from scipy.stats import t

    rises, bounds = [], []
    columns = (np.reshape(part, (len(part), -1)).T for part in (*before, *after))
    for total, count, total_after, count_after in zip(*columns, strict=True):
        counted = (count > 0) & (count_after > 0)
        changes = total_after[counted] / count_after[counted] - total[counted] / count[counted]
        rise = total_after.sum() / count_after.sum() - total.sum() / count.sum()
        spread = changes.std(ddof=1) / len(changes) ** 0.5 if len(changes) > 1 else np.inf
        rises.append(rise)
        bounds.append(rise + t.ppf(0.95, max(len(changes) - 1, 1)) * spread)
    shape = before[0].shape[1:]
    return np.reshape(rises, shape).astype(np.float32), np.reshape(bounds, shape).astype(np.float32)


def sets_to_measure(
    data: PyTree, name: str, plan: Plan, least: int, processes: Processes = ALONE
) -> RetainSets:
    """Rows like those of retain in batches no larger than its own, and as many as `least` where rows suffice.

    ValueError or TypeError that names them where nothing can be measured on them.
    """
    own = [np.shape(leaf)[0] for leaf in jax.tree.leaves(data) if np.ndim(leaf)]
    lengths = [length // least for part in processes.by_part(own) for length in part]
    size = max(1, min([*(rows // processes.parts for rows in plan.retain_rows), *lengths]))
    sets = retain_sets(data, size, name)
    if not sets.are_arrays:
        raise ValueError(f"{name} must hold arrays, which can be gone through from end to end, no function")
    for each, rows in sets.sets.items():
        check_set(rows, each, sets.sizes[each])
    return sets
