"""Closed forms: the projection against brute force, and the multiplier's limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eupmu_jax as eu

SIZE = 6
project = jax.jit(eu.unilateral_projection)


def brute_force(g_f, g_r, eps):
    """The nearest feasible direction over all 2^K active sets, or None if none is feasible."""
    best = None
    for active in itertools.chain.from_iterable(
        itertools.combinations(range(len(g_r)), n) for n in range(len(g_r) + 1)
    ):
        rows, multiplier = list(active), np.zeros(len(g_r))
        if rows:
            gram = g_r[rows] @ g_r[rows].T
            multiplier[rows] = np.linalg.lstsq(gram, -(g_r[rows] @ g_f + eps[rows]), rcond=1e-13)[0]
        direction = g_f + multiplier @ g_r
        size = np.linalg.norm(g_r, axis=1) * np.linalg.norm(direction) + np.abs(eps) + 1e-300
        feasible = np.all((-(g_r @ direction) - eps) / size <= 1e-9)
        if feasible and np.all(multiplier >= -1e-12 * np.abs(multiplier).max()):
            distance = np.linalg.norm(direction - g_f)
            if best is None or distance < best[0]:
                best = (distance, direction)
    return None if best is None else best[1]


def relate(kind, g_r, rng):
    """K random gradients made into a hard case; factors that every dtype holds exactly."""
    if kind == "parallel":
        g_r[-1] = 2.0 ** rng.integers(-3, 4) * g_r[0]
    elif kind == "antiparallel":
        g_r[-1] = -(2.0 ** rng.integers(-3, 4)) * g_r[0]
    elif kind == "nearly parallel":
        g_r[-1] = g_r[0] + 1e-4 * g_r[-1]
    elif kind == "orthogonal":
        g_r = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0][: len(g_r)]
    elif kind == "zero":
        g_r[rng.integers(len(g_r))] = 0
    return g_r


KINDS = ["random", "parallel", "antiparallel", "nearly parallel", "orthogonal", "zero", "scaled"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("utilities", [1, 2, 3, 4])
def test_projection_equals_brute_force(kind, utilities, x64):
    rng = np.random.default_rng(KINDS.index(kind) * 10 + utilities)
    compared = 0
    for _ in range(60):
        g_f, g_r = rng.normal(size=SIZE), relate(kind, rng.normal(size=(utilities, SIZE)), rng)
        eps = rng.choice([0, 0.1, -0.1]) * rng.uniform(size=utilities)
        if kind == "scaled":
            scale, scale_f = 10 ** rng.uniform(-15, 15, utilities), 10 ** rng.uniform(-15, 15)
            g_r, g_f, eps = g_r * scale[:, None], g_f * scale_f, eps * scale * scale_f
        direction, multiplier = project(jnp.asarray(g_f), jnp.asarray(g_r), jnp.asarray(eps))
        assert np.all(np.isfinite(direction))
        assert np.all(np.isfinite(multiplier) & (multiplier >= 0))
        exact = brute_force(g_f, g_r, eps)
        if exact is None:
            continue  # no direction keeps all tolerances: only finite is promised
        compared += 1
        assert np.linalg.norm(direction - exact) <= 1e-8 * np.linalg.norm(g_f)
        if utilities == 1:
            alone, number = project(jnp.asarray(g_f), jnp.asarray(g_r[0]), float(eps[0]))
            np.testing.assert_allclose(alone, direction, rtol=1e-12, atol=0)
            np.testing.assert_allclose(number, multiplier[0], rtol=1e-12)
    assert compared >= 20


finite = st.floats(-10, 10).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
exponents = st.floats(-15, 15)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), utilities=st.integers(1, 4), log_scale=st.tuples(exponents, exponents))
def test_projection_satisfies_kkt(data, utilities, log_scale):
    """lambda >= 0; violation <= 0; lambda * violation = 0, each relative to its own scale."""
    with jax.enable_x64(True):
        rows = data.draw(st.lists(finite, min_size=SIZE * (utilities + 1), max_size=SIZE * (utilities + 1)))
        g = np.reshape(rows, (utilities + 1, SIZE))
        g_f, g_r = g[0] * 10 ** log_scale[0], g[1:] * 10 ** log_scale[1]
        # A tolerance >= 0 is always feasible (d = 0).
        eps = np.array(data.draw(st.lists(st.floats(0, 1), min_size=utilities, max_size=utilities)))
        eps = eps * 10 ** (log_scale[0] + log_scale[1])
        direction, multiplier = map(np.asarray, project(jnp.asarray(g_f), jnp.asarray(g_r), jnp.asarray(eps)))
        norms, size = np.linalg.norm(g_r, axis=1), np.linalg.norm(g_f)
        violation = -(g_r @ direction) - eps
        assert np.all(multiplier >= 0)
        assert np.all(violation <= 1e-7 * norms * size)
        assert np.all(multiplier * np.abs(violation) <= 1e-7 * np.maximum(multiplier, 1e-300) * norms * size)
        np.testing.assert_allclose(direction, g_f + multiplier @ g_r, atol=1e-9 * (size + multiplier @ norms))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(finite, min_size=2 * SIZE, max_size=2 * SIZE),
    scale=st.floats(1e-3, 1e3),
    tolerance=st.floats(-1, 1),
)
def test_projection_is_homogeneous_and_never_shorter_than_needed(rows, scale, tolerance):
    """Scaling g_r and the tolerance together changes nothing; no conflict leaves g_f alone."""
    with jax.enable_x64(True):
        g_f, g_r = jnp.asarray(rows[:SIZE]), jnp.asarray(rows[SIZE:])
        direction, multiplier = project(g_f, g_r, jnp.asarray(tolerance))
        scaled, _ = project(g_f, scale * g_r, jnp.asarray(scale * tolerance))
        np.testing.assert_allclose(scaled, direction, rtol=1e-9, atol=1e-9)
        if float(g_r @ g_f) >= -tolerance:
            np.testing.assert_array_equal(direction, g_f)
            assert float(multiplier) == 0


def test_what_cannot_be_met_stays_finite_and_does_least_harm():
    g = jnp.array([1.0, 0.0])
    direction, multiplier = project(g, jnp.zeros(2), tolerance=-1.0)
    np.testing.assert_array_equal(direction, g)
    assert float(multiplier) == 0
    both = jnp.stack([g, -g])
    direction, multiplier = project(jnp.array([0.0, 1.0]), both, tolerance=-1.0)
    assert jnp.all(jnp.isfinite(multiplier))
    np.testing.assert_allclose(direction, jnp.array([0.0, 1.0]), atol=0.1)


@pytest.mark.parametrize("kind", ["random", "parallel", "antiparallel", "orthogonal", "zero", "scaled"])
@pytest.mark.parametrize("utilities", [1, 2, 3, 6])
def test_float32_projection_is_near_the_float64_one(kind, utilities):
    rng = np.random.default_rng(utilities)
    for _ in range(30):
        g_f = rng.normal(size=8).astype(np.float32)
        g_r = rng.normal(size=(utilities, 8))
        if kind == "scaled":
            g_r *= 10 ** rng.uniform(-15, 15, (utilities, 1))
        elif utilities > 1 or kind == "zero":
            g_r = relate(kind, g_r[:, :SIZE].astype(np.float32), rng)
            g_r = np.pad(g_r, ((0, 0), (0, 8 - SIZE)))
        g_r = g_r.astype(np.float32)
        direction, _ = project(jnp.asarray(g_f), jnp.asarray(g_r))
        with jax.enable_x64(True):
            exact, _ = project(jnp.asarray(g_f, jnp.float64), jnp.asarray(g_r, jnp.float64))
        assert np.linalg.norm(direction - np.asarray(exact)) <= 1e-3 * np.linalg.norm(g_f)


def test_each_device_may_project_for_a_model_of_its_own():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    g_f, g_r = jnp.asarray(rng.normal(size=(8, 5))), jnp.asarray(rng.normal(size=(8, 2, 5)))
    own = lambda f, r: eu.unilateral_projection(f[0], r[0])[0][None]
    spec = jax.sharding.PartitionSpec("model")
    each = jax.shard_map(own, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(g_f, g_r)
    one_by_one = [eu.unilateral_projection(f, r)[0] for f, r in zip(g_f, g_r, strict=True)]
    np.testing.assert_allclose(each, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("angle", [1e-1, 3e-2, 1e-2])
def test_float32_projection_between_nearly_opposed_gradients(angle):
    rng = np.random.default_rng(0)
    for _ in range(60):
        g_f, g, other, third = rng.normal(size=(4, 8)).astype(np.float32)
        g_r = np.stack([g, -g + angle * other, third])
        direction, _ = project(jnp.asarray(g_f), jnp.asarray(g_r))
        # A single regularised solve in place of the proximal iterations ends at up to 4e-4.
        assert np.all(-(g_r @ direction) <= 1e-4 * np.linalg.norm(g_r, axis=1) * np.linalg.norm(g_f))


@pytest.mark.parametrize("project", [eu.unilateral_projection, jax.jit(eu.unilateral_projection)])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_float32_projection_does_not_lose_a_constraint_to_overflow(scale, project):
    """Compiled, too, where XLA changes the order of divisions."""
    g_f, g_r = jnp.array([1.0, 1.0]), scale * jnp.array([-1.0, 0.0])
    direction, multiplier = project(g_f, g_r)
    np.testing.assert_allclose(direction, [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(multiplier, 1 / scale, rtol=1e-5)
    direction, _ = project(g_f * scale, jnp.array([-1.0, 0.0]))
    np.testing.assert_allclose(direction / scale, [0.0, 1.0], atol=1e-6)
    direction, _ = project(g_f * scale, g_r)
    np.testing.assert_allclose(direction / scale, [0.0, 1.0], atol=1e-6)
    wide, _ = project(jnp.ones(100_000), jnp.full(100_000, -3e16))
    np.testing.assert_allclose(wide, 0, atol=1e-5)


@pytest.mark.parametrize("project", [eu.unilateral_projection, jax.jit(eu.unilateral_projection)])
@pytest.mark.parametrize("tolerance", [0.0, -0.01])
def test_a_utility_without_a_gradient_to_speak_of_takes_no_other_constraint_away(tolerance, project):
    g_f, g_r = 1e-3 * jnp.array([1.0, 1.0]), jnp.array([[-1.0, 0.0], [0.0, -1e-37]])
    direction, multiplier = project(g_f, g_r, jnp.array([0.0, tolerance]))
    np.testing.assert_allclose(direction[0], 0.0, atol=1e-9)
    np.testing.assert_allclose(multiplier[0], 1e-3, rtol=1e-5)
    assert jnp.all(jnp.isfinite(direction))


def test_a_multiplier_that_overflows_is_not_applied():
    g_f = jnp.array([1.0, 1.0])
    direction, multiplier = eu.unilateral_projection(g_f, jnp.array([1e-30, 0.0]), tolerance=-10.0)
    np.testing.assert_array_equal(direction, g_f)
    assert float(multiplier) == 0
    half, _ = eu.unilateral_projection(g_f.astype(jnp.float16), jnp.array([1e-4, 0], jnp.float16), -100.0)
    assert jnp.all(jnp.isfinite(half))


def test_projection_does_not_hide_what_is_not_finite():
    for bad in (jnp.nan, jnp.inf):
        direction, _ = eu.unilateral_projection(jnp.ones(2), jnp.array([bad, -1.0]))
        assert not jnp.all(jnp.isfinite(direction))


def test_projection_over_a_tree_and_a_batch_of_problems(x64):
    rng = np.random.default_rng(0)
    g_f, g_r = rng.normal(size=(5, SIZE)), rng.normal(size=(5, 3, SIZE))
    batched = jax.jit(jax.vmap(eu.unilateral_projection))
    flat = batched(jnp.asarray(g_f), jnp.asarray(g_r))
    tree_f = {"a": g_f[:, :2].reshape(5, 1, 2), "b": g_f[:, 2:]}
    tree_r = {"a": g_r[:, :, :2].reshape(5, 3, 1, 2), "b": g_r[:, :, 2:]}
    tree = batched(*jax.tree.map(jnp.asarray, (tree_f, tree_r)))
    np.testing.assert_allclose(tree[1], flat[1], rtol=1e-12)
    np.testing.assert_allclose(tree[0]["a"].reshape(5, 2), flat[0][:, :2], rtol=1e-12)
    one = project(jnp.asarray(g_f[2]), jnp.asarray(g_r[2]))
    np.testing.assert_allclose(flat[0][2], one[0], rtol=1e-9)


def test_float32_projection_accumulates_wider_than_bfloat16():
    g_f = jnp.ones(4096, jnp.bfloat16)
    direction, multiplier = eu.unilateral_projection(g_f, -g_f)
    assert multiplier.dtype == jnp.float32
    assert direction.dtype == jnp.bfloat16
    assert float(multiplier) == 1.0


# Implicit: frozen gradients.

G_F = np.array([1.0, -2.0, 0.5, 1.0])
G_R = np.array([[-1.0, 1.0, 0.0, 0.2], [-0.3, -0.2, -1.0, 0.1], [0.5, 0.5, 0.5, -1.5]])


def run_linear(g_r, tolerance, inner, alpha, measure, steps=4000):
    """EUPMU on linear losses with a dual step of a tenth of the one-step-exact 1 / (alpha |g_r|^2)."""
    g_f = jnp.asarray(G_F)
    losses_fn = lambda x, batch: eu.Losses(g_f @ x, g_r @ x)
    per_step = 1.0 if measure == "directional" else alpha  # the tolerance is a rate here
    norm = float(jnp.max(jnp.sum(g_r**2, -1)))
    tx = eu.eupmu(
        losses_fn,
        inner,
        eu.Tolerance(
            per_step * tolerance,
            measure=measure,
            dual_optimizer=optax.sgd(0.1 / (per_step * norm)),
            normalize_weights=False,
        ),
        initial_multiplier=jnp.zeros(g_r.shape[:-1]),
    )

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(None, state, x, batch=())
        return (optax.apply_updates(x, updates), state), None

    x = jnp.zeros(4)
    (_, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=steps)
    return eu.surgery_info(state)


@pytest.mark.parametrize("measure", ["lookahead", "lagged", "directional"])
@pytest.mark.parametrize("momentum", [None, 0.5])
@pytest.mark.parametrize("utilities", [1, 3])
def test_multiplier_reaches_the_closed_form_on_frozen_gradients(measure, momentum, utilities, x64):
    g_r = jnp.asarray(G_R[0] if utilities == 1 else G_R)
    tolerance = jnp.asarray(0.1 if utilities == 1 else [0.1, 0.0, -0.05])
    # Momentum lengthens the step by 1 / (1 - momentum) in the long run.
    alpha = 1e-2
    learning_rate = alpha * (1 - (momentum or 0.0))
    inner = optax.sgd(learning_rate, momentum=momentum)
    info = run_linear(g_r, tolerance, inner, alpha, measure)
    _, exact = eu.unilateral_projection(jnp.asarray(G_F), g_r, tolerance)
    assert np.any(exact > 0.1)
    np.testing.assert_allclose(info.multiplier, exact, atol=1e-8)
    assert np.all(info.violation <= 1e-8)
    np.testing.assert_allclose(info.multiplier * info.violation, 0, atol=1e-8)


def test_directional_violation_in_log_space_is_relative(x64):
    g_f, g_r = jnp.asarray(G_F), jnp.asarray(G_R[0])
    losses_fn = lambda x, batch: eu.Losses(g_f @ x + 2.0, g_r @ x + 4.0)
    tolerance = eu.Tolerance(0.0, measure="directional", log_losses=True, normalize_weights=False)
    tx = eu.eupmu(losses_fn, None, tolerance)
    x = jnp.zeros(4)
    _, state = tx.update(None, tx.init(x), x, batch=())
    np.testing.assert_allclose(eu.surgery_info(state).violation, -(g_r / 4) @ (g_f / 2 + g_r / 4), rtol=1e-6)


@pytest.mark.parametrize("measure", ["lookahead", "lagged", "directional"])
@pytest.mark.parametrize("log_losses", [False, True])
def test_quadratics_end_stationary_and_within_tolerance(measure, log_losses, x64):
    """|g_f + lambda g_r| and the violation go to 0; which Pareto point depends on the path."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5))
    curvature = jnp.asarray(np.diag(rng.uniform(0.5, 2, 5)))

    def losses_fn(x, batch):
        return eu.Losses((x - a) @ curvature @ (x - a) + 0.1, jnp.sum((x - b) ** 2) + 0.1)

    tx = eu.eupmu(
        losses_fn,
        optax.sgd(0.02),
        eu.Tolerance(
            0.0,
            measure=measure,
            dual_optimizer=optax.sgd(0.5 if measure == "directional" else 5.0),
            log_losses=log_losses,
        ),
        initial_multiplier=jnp.asarray(1.0),
    )

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(None, state, x, batch=())
        return (optax.apply_updates(x, updates), state), None

    x = jnp.asarray(b)
    (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=4000)
    losses, g_f, g_r = eu.forget_and_retain_grads(losses_fn)(x, ())
    if log_losses:
        g_f, g_r = g_f / losses.forget, g_r / losses.retain
    multiplier = eu.multiplier(state)
    assert float(multiplier) > 0.01
    assert float(jnp.linalg.norm(g_f + multiplier * g_r)) < 1e-6
    assert abs(float(eu.surgery_info(state).violation)) < 1e-8


def test_directional_violation_is_the_slope_of_the_dual_and_ignores_the_learning_rate(x64):
    g_f, g_r = jnp.asarray(G_F), jnp.asarray(G_R[0])
    losses_fn = lambda x, batch: eu.Losses(g_f @ x, g_r @ x)
    for learning_rate in (1e-3, 1.0):
        tx = eu.eupmu(
            losses_fn,
            optax.sgd(learning_rate),
            eu.Tolerance(0.25, measure="directional", normalize_weights=False),
            initial_multiplier=jnp.asarray(0.5),
        )
        x = jnp.zeros(4)
        _, state = tx.update(None, tx.init(x), x, batch=())
        slope = g_r @ (g_f + 0.5 * g_r) + 0.25
        np.testing.assert_allclose(eu.surgery_info(state).violation, -slope, rtol=1e-12)


def test_normalised_weights_and_log_space_by_hand(x64):
    """One step of K = 2 in log space: d = (g_f / U + sum lambda_k g_k / R_k) / (1 + sum lambda)."""
    losses_fn = lambda x, batch: eu.Losses(3.0 * x[0] + 2.0, jnp.stack([x[0] + 4.0, 2.0 * x[1] + 8.0]))
    first = jnp.asarray([1.0, 2.0])
    tx = eu.eupmu(losses_fn, None, eu.Tolerance(0.0, log_losses=True), initial_multiplier=first)
    x = jnp.zeros(2)
    direction, _ = tx.update(None, tx.init(x), x, batch=())
    np.testing.assert_allclose(direction, [(3 / 2 + 1 / 4) / 4, (2 * 2 / 8) / 4], rtol=1e-12)
