"""How fast a budgeted run reaches the KKT point of a convex problem; convergence.md has the theory."""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import scipy.optimize

import eupmu_jax as eu
from eupmu_jax.method.budget import TARGET
from experiments.shared.report import Frame, grid, save

DECAYS = {"constant": 0.0, "1/sqrt(t)": 0.5, "1/t": 1.0}
NOISES = ("deterministic", "stochastic")
BUDGET_SHARE = 0.1
POINTS = 40
MEASURES = {"residual": "last iterate", "average": "running average", "distance": "last iterate's x"}
PANELS = (
    ("deterministic", "residual"),
    ("deterministic", "average"),
    ("stochastic", "residual"),
    ("stochastic", "distance"),
    ("stochastic", "average"),
)
GUIDES = {"deterministic": {-0.5: ":", -1.0: "-."}, "stochastic": {-0.25: (0, (1, 4)), -0.5: ":"}}


class Problem(NamedTuple):
    """Minimise U subject to R <= bound, from the point `start`.

    `minimiser(w)` is that of (1 - w) U + w R; `sample(key)` draws a batch, of which `full` is the mean.
    """

    losses: Callable[[jax.Array, Any], eu.Losses]
    sample: Callable[[jax.Array], Any]
    full: Any
    start: np.ndarray
    minimiser: Callable[[float], np.ndarray]


class Setting(NamedTuple):
    """A problem's R_0, budget and bound, its KKT point, and the steps that its curvature there asks for."""

    baseline: float
    budget: float
    bound: float
    solution: np.ndarray
    multiplier: float
    primal_step: float
    dual_step: float
    offset: float


def quadratic(dimension: int = 20, condition: float = 50.0, noise: float = 0.02) -> Problem:
    """Two ellipsoids of different axes; the noise is <xi, x> with a fresh normal xi for either loss."""
    rng = np.random.default_rng(0)

    def ellipsoid():
        axes = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]
        return axes * np.geomspace(1 / condition, 1, dimension) @ axes.T

    forget, retain, centre = ellipsoid(), ellipsoid(), rng.normal(size=dimension)

    def losses(x, xi):
        value = lambda matrix, by: (x - by) @ matrix @ (x - by) / 2
        return eu.Losses(value(forget, centre) + xi[0] @ x, value(retain, 0.0) + xi[1] @ x)

    def minimiser(w):
        return np.linalg.solve((1 - w) * forget + w * retain, (1 - w) * forget @ centre)

    sample = lambda key: noise * jax.random.normal(key, (2, dimension))
    return Problem(losses, sample, np.zeros((2, dimension)), minimiser(1.0), minimiser)


def logistic(dimension: int = 10, decay: float = 0.02, batch_size: int = 32) -> Problem:
    """Logistic regression, 400 examples to retain and 100 to forget by their flipped labels, in batches."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(500, dimension)) * np.geomspace(1, 0.3, dimension)
    labels = np.sign(inputs @ rng.normal(size=dimension) + rng.normal(size=500))
    signed = inputs * labels[:, None]
    full = {"forget": -signed[:100], "retain": signed[100:]}

    def losses(x, batch):
        value = lambda rows: jnp.mean(jax.nn.softplus(-rows @ x)) + decay / 2 * x @ x
        return eu.Losses(value(batch["forget"]), value(batch["retain"]))

    def sample(key):
        rows = lambda key, part: jax.random.choice(key, jnp.asarray(part), (batch_size,))
        return {name: rows(k, full[name]) for name, k in zip(full, jax.random.split(key), strict=True)}

    def minimiser(w):
        parts = ((1 - w, full["forget"]), (w, full["retain"]))
        answers = lambda rows, x: 1 / (1 + np.exp(rows @ x))
        slope = lambda x: decay * x - sum(c * answers(r, x) @ r / len(r) for c, r in parts)
        return scipy.optimize.root(slope, np.zeros(dimension), method="hybr", options={"xtol": 1e-14}).x

    return Problem(losses, sample, full, minimiser(1.0), minimiser)


def quartic(dimension: int = 20, noise: float = 0.05) -> Problem:
    """Fourth powers; half of the coordinates have one optimum for both losses, without curvature there."""
    flat = np.arange(dimension) < dimension // 2
    centre = np.where(flat, 0.0, np.linspace(0.5, 1.5, dimension))

    def losses(x, xi):
        return eu.Losses(jnp.sum((x - centre) ** 4) / 4 + xi[0] @ x, jnp.sum(x**4) / 4 + xi[1] @ x)

    sample = lambda key: noise * jax.random.normal(key, (2, dimension))
    minimiser = lambda w: centre / (1 + np.cbrt(w / (1 - w))) if w < 1 else np.zeros(dimension)
    return Problem(losses, sample, np.zeros((2, dimension)), np.where(flat, 0.5, 0.0), minimiser)


PROBLEMS = {"quadratic": quadratic, "logistic": logistic, "quartic": quartic}


def setting(problem: Problem) -> Setting:
    """The KKT point by a root search on the multiplier, and the curvatures there; in float64."""
    losses = jax.jit(lambda x: jnp.stack(problem.losses(x, problem.full)))
    retain = lambda x: float(losses(x)[1])
    baseline = retain(problem.start)
    budget = BUDGET_SHARE * (retain(problem.minimiser(0.0)) - baseline)
    bound = baseline + TARGET * budget
    excess = lambda w: retain(problem.minimiser(w)) - bound
    w = scipy.optimize.root_scalar(excess, bracket=(0.0, 1.0), xtol=1e-15).root
    solution = problem.minimiser(w)
    slope = np.asarray(jax.jacobian(losses)(solution)[1])
    curvature = lambda x: np.tensordot([1 - w, w], np.asarray(jax.hessian(losses)(x)), 1)
    highest = max(np.linalg.eigvalsh(curvature(x))[-1] for x in (solution, problem.start))
    lowest = max(np.linalg.eigvalsh(curvature(solution))[0], highest / 50)
    # How far R falls, to first order, when the multiplier rises by one.
    response = slope @ np.linalg.pinv(curvature(solution)) @ slope * (1 - w)
    step = 0.5 / highest
    return Setting(
        baseline=baseline,
        budget=budget,
        bound=bound,
        solution=solution,
        multiplier=w / (1 - w),
        primal_step=step,
        dual_step=step * lowest / response,
        offset=4 / (step * lowest),
    )


def package_step(problem: Problem, at: Setting, rate: Callable):
    """eupmu with a budget on SGD: the state before the first step, and the step."""
    tx = eu.eupmu(
        problem.losses,
        optax.sgd(rate),
        eu.Budget(at.budget, baseline=at.baseline),
        initial_multiplier=jnp.ones([], problem.start.dtype),
    )

    def step(x, state, batch):
        updates, state = tx.update(None, state, x, batch=batch)
        return optax.apply_updates(x, updates), state, eu.multiplier(state)

    return tx.init(jnp.asarray(problem.start)), step


def textbook_step(problem: Problem, at: Setting, rate: Callable):
    """Gradient descent on x and ascent on the multiplier, kept in an interval, of U + multiplier (R - bound).

    Its steps are made of the curvatures and the multiplier at the solution, which the package is not told.
    """

    def step(x, state, batch):
        multiplier, count = state
        losses = lambda x: jnp.stack(problem.losses(x, batch))
        forget, retain = jax.jacobian(losses)(x)
        primal = rate(count) / (1 + at.multiplier)
        dual = rate(count) / at.primal_step * at.dual_step
        ascended = jnp.clip(multiplier + dual * (losses(x)[1] - at.bound), 0, 2 * at.multiplier + 1)
        return x - primal * (forget + multiplier * retain), (ascended, count + 1), multiplier

    return (jnp.ones([], problem.start.dtype), jnp.zeros([], int)), step


METHODS = {"this package": package_step, "textbook primal-dual": textbook_step}


def residual(problem: Problem, bound: float, x: jax.Array, share: jax.Array) -> jax.Array:
    """The largest of stationarity, violation and complementarity, of the full losses.

    `share` is R's share of the weights, multiplier / (1 + multiplier).
    """
    losses = lambda x: jnp.stack(problem.losses(x, problem.full))
    forget, retain = jax.jacobian(losses)(x)
    excess = losses(x)[1] - bound
    stationarity = jnp.linalg.norm((1 - share) * forget + share * retain)
    return jnp.max(jnp.stack([stationarity, excess, jnp.abs(share * excess)]))


def trace(problem: Problem, at: Setting, method: str, noisy: bool, steps: np.ndarray, decay, key):
    """(x_t, R's share of the weights) after each number of steps, and their averages over all so far."""
    rate = lambda count: at.primal_step / (1 + count / at.offset) ** decay
    start, step = METHODS[method](problem, at, rate)

    def advance(count, carry):
        x, state, _, total = carry
        batch = problem.sample(jax.random.fold_in(key, count)) if noisy else problem.full
        after, state, multiplier = step(x, state, batch)
        last = (x, multiplier / (1 + multiplier))
        return after, state, last, jax.tree.map(jnp.add, total, last)

    def to_next(carry, span):
        begin, end = span
        carry = jax.lax.fori_loop(begin, end, advance, carry)
        _, _, last, total = carry
        return carry, (last, jax.tree.map(lambda sum: sum / end, total))

    x = jnp.asarray(problem.start)
    nothing = (jnp.zeros_like(x), jnp.zeros([], x.dtype))
    spans = (jnp.asarray([0, *steps[:-1]]), jnp.asarray(steps))
    return jax.lax.scan(to_next, (x, start, nothing, nothing), spans)[1]


def curves(problem: Problem, at: Setting, method: str, noisy: bool, steps: np.ndarray, seeds: int):
    """What `run` measures, arrays [decay, number of steps] by name."""

    def measured(decay, key):
        last, average = trace(problem, at, method, noisy, steps, decay, key)
        measure = jax.vmap(lambda x, share: residual(problem, at.bound, x, share))
        distance = jnp.linalg.norm(last[0] - at.solution, axis=-1)
        return {"residual": measure(*last), "average": measure(*average), "distance": distance}

    over_seeds = jax.vmap(measured, in_axes=(None, 0))
    keys = jax.random.split(jax.random.key(0), seeds if noisy else 1)
    out = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(jnp.array([*DECAYS.values()]), keys)
    return {name: np.sqrt(np.mean(np.square(values), axis=1)) for name, values in out.items()}


def run(steps: int = 20000, seeds: int = 8, problems: Sequence[str] = tuple(PROBLEMS)) -> Frame:
    """A row for each problem, noise, method, decay of the steps and number of steps; in float64.

    residual and distance (to the solution) are the last iterate's, average is the residual of the
    running average; root mean squares over the seeds. length is the sum of the steps so far, in first steps.
    """
    numbers = np.unique(np.geomspace(1, steps, POINTS).astype(int))
    parts = []
    with jax.enable_x64(True):
        for name in problems:
            problem = PROBLEMS[name]()
            at = setting(problem)
            for noise, method in itertools.product(NOISES, METHODS):
                out = curves(problem, at, method, noise == "stochastic", numbers, seeds)
                for i, (decay, power) in enumerate(DECAYS.items()):
                    length = np.cumsum((1 + np.arange(steps) / at.offset) ** -power)[numbers - 1]
                    columns = {"problem": name, "noise": noise, "method": method, "decay": decay}
                    columns |= {"step": numbers, "length": length}
                    parts.append(pd.DataFrame(columns | {key: of[i] for key, of in out.items()}))
    return pd.concat(parts, ignore_index=True)


def rates(frame: Frame) -> Frame:
    """For each curve the exponents of t over the last decade, or what a unit of length multiplies by.

    The latter, "factor", where the last iterate's residual became less than 1e-10 of its first value.
    """

    def fitted(part):
        decade = part[part["step"] >= part["step"].max() / 10]
        slope = lambda of, x, y: np.polyfit(x(of), np.log(of[y]), 1)[0] if len(of) > 1 else np.nan
        power = lambda y: slope(decade, lambda of: np.log(of["step"]), y)
        share = part["residual"] / part["residual"].iloc[0]
        if share.min() >= 1e-10:
            return pd.Series({key: power(key) for key in MEASURES})
        falling = part[(share < 1e-2) & (share > 1e-11)]
        factor = np.exp(slope(falling, lambda of: of["length"], "residual"))
        return pd.Series({"factor": factor, "average": power("average")})

    keys = ["noise", "problem", "decay", "method"]
    groups = frame.groupby(keys, sort=False)
    return pd.DataFrame({key: fitted(part) for key, part in groups}).T.rename_axis(keys)


def plot(path: pathlib.Path, frame: Frame) -> None:
    """What `run` measured against steps: a column for each problem, a row for each of PANELS."""
    problems = list(frame["problem"].unique())
    figure, axes = grid(len(PANELS) * len(problems), len(problems), 4.8, 3)
    looks = list(itertools.product(enumerate(DECAYS), zip(METHODS, ("-", "--"), strict=True)))
    for axis, ((noise, measure), problem) in zip(axes, itertools.product(PANELS, problems), strict=True):
        part = frame[(frame["noise"] == noise) & (frame["problem"] == problem)]
        for (i, decay), (method, line) in looks:
            of = part[(part["decay"] == decay) & (part["method"] == method)]
            name = f"{method}, {decay}"
            axis.plot(of["step"], of[measure], line, color=f"C{i}", linewidth=3 - i, label=name)
        ends = np.array([part["step"].max() / 30, part["step"].max()])
        height = part[part["step"] >= ends[0]][measure].max() * 2
        for power, line in GUIDES[noise].items():
            guide = height * (ends / ends[0]) ** power
            axis.plot(ends, guide, linestyle=line, color="black", linewidth=1, label=f"slope {power:g}")
        axis.set(xscale="log", yscale="log", title=f"{problem}, {noise}: {MEASURES[measure]}")
        axis.set(xlabel="steps", ylabel="distance to solution" if measure == "distance" else "KKT residual")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    save(figure, path, legend=5)
