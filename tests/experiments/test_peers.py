"""Each peer's update on a step worked by hand, in float64, for a two-class linear model."""

import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu
from experiments.shared.labels import LabelledExamples, label_losses
from experiments.shared.methods.eupmu import eupmu, eupmu_budget
from experiments.shared.methods.exact_surgery import exact_surgery
from experiments.shared.methods.famo import famo
from experiments.shared.methods.fine_tuning import fine_tuning
from experiments.shared.methods.gdr_gma import gdr_gma
from experiments.shared.methods.gradient_ascent import gradient_ascent
from experiments.shared.methods.l1_sparse import l1_sparse
from experiments.shared.methods.method import Batch, LossFunctions
from experiments.shared.methods.neggrad_plus import neggrad_plus
from experiments.shared.methods.ngdiff import ngdiff
from experiments.shared.methods.pcgrad import pcgrad
from experiments.shared.methods.pdu import pdu
from experiments.shared.methods.salun import salun
from experiments.shared.methods.scalarisation import scalarisation
from experiments.shared.methods.scrub import ScrubState, scrub
from experiments.shared.peers import PEERS

pytestmark = pytest.mark.usefixtures("x64")

RATE = 0.1
SGD = optax.sgd(RATE)
FORGET_X, FORGET_Y = np.array([[1.0, -0.5], [0.3, 0.8]]), np.array([0, 1])
RETAIN_X, RETAIN_Y = np.array([[-0.4, 1.2], [0.9, 0.1]]), np.array([1, 0])
WRONG = 1 - FORGET_Y
UNSEEN = np.array([0.4, -2.5])


def apply(params, x):
    score = x @ params["a"] + params["b"][0]
    return jnp.stack([score, jnp.zeros_like(score)], -1)


LOSSES = label_losses(apply)


def the_bias(params):
    return params["b"]


def start():
    return {"a": jnp.array([0.7, -0.4]), "b": jnp.array([0.2])}


def flat(params):
    return np.concatenate([np.asarray(params["a"]), np.asarray(params["b"])])


def batch(progress=0.0):
    forget = LabelledExamples(FORGET_X, FORGET_Y, WRONG, UNSEEN)
    retain = LabelledExamples(RETAIN_X, RETAIN_Y, 1 - RETAIN_Y, np.full(2, np.nan))
    share = np.float64(0.5)
    return jax.tree.map(jnp.asarray, Batch(forget, retain, np.float64(progress), share))


def loss_and_grad(theta, x, y):
    """Cross-entropy of the linear model and its gradient [3], by the logistic formulas."""
    sign = np.where(y == 0, 1.0, -1.0)
    margin = sign * (x @ theta[:2] + theta[2])
    inputs = np.concatenate([x, np.ones((len(x), 1))], 1)
    slope = -sign / (1 + np.exp(margin))
    return np.mean(np.log1p(np.exp(-margin))), (slope[:, None] * inputs).mean(0)


wrong_loss = partial(loss_and_grad, x=FORGET_X, y=WRONG)
true_loss = partial(loss_and_grad, x=FORGET_X, y=FORGET_Y)
retain_loss = partial(loss_and_grad, x=RETAIN_X, y=RETAIN_Y)


def stepped(method, batches=(None,)):
    """Parameters [3] and record after steps on the given batches (None: the usual one)."""
    params = start()
    whole = jax.tree.map(lambda leaf: leaf[None], batch())
    state = method.init(params, whole)
    for given in batches:
        params, state, seen = jax.jit(method.step)(params, state, given or batch())
    return flat(params), state, seen


def projected_off(g, other):
    """g without its part along other, where they conflict."""
    return g - min(g @ other, 0) / (other @ other) * other


def check(method, direction, **recorded):
    theta, _, seen = stepped(method)
    np.testing.assert_allclose(theta, flat(start()) - RATE * direction, rtol=1e-12)
    for name, value in recorded.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-6, err_msg=name)


def test_the_hand_worked_gradient_is_the_models():
    theta = flat(start())
    grads = jax.grad(
        lambda p: optax.softmax_cross_entropy_with_integer_labels(apply(p, RETAIN_X), RETAIN_Y).mean()
    )(start())
    np.testing.assert_allclose(flat(grads), retain_loss(theta)[1], rtol=1e-12)
    assert wrong_loss(theta)[1] @ retain_loss(theta)[1] < 0, "the two conflict, or surgery has no work"
    assert -true_loss(theta)[1] @ retain_loss(theta)[1] < 0


def test_fine_tuning():
    loss, grad = retain_loss(flat(start()))
    check(fine_tuning(LOSSES, SGD), grad, retain_loss=loss, forget_loss=np.nan)


def test_gradient_ascent():
    loss, grad = true_loss(flat(start()))
    check(gradient_ascent(LOSSES, SGD), -grad, forget_loss=-loss)


def test_neggrad_plus():
    (forget, g_f), (_, g_r) = true_loss(flat(start())), retain_loss(flat(start()))
    check(neggrad_plus(LOSSES, SGD, ascent=0.2), 0.8 * g_r - 0.2 * g_f, forget_loss=-forget, multiplier=4)


def test_random_labels():
    (forget, g_f), (retain, g_r) = wrong_loss(flat(start())), retain_loss(flat(start()))
    recorded = {"forget_loss": forget, "retain_loss": retain, "multiplier": 3}
    check(scalarisation(LOSSES, SGD, weight=3.0), (g_f + 3 * g_r) / 4, **recorded)
    got, _, seen = stepped(scalarisation(LOSSES, SGD, weight=5.0, ramped=True), [batch(progress=0.5)])
    np.testing.assert_allclose(got, flat(start()) - RATE * (g_f + 3 * g_r) / 4, rtol=1e-12)
    assert seen["multiplier"] == 3
    direction = (g_f / forget + 3 * g_r / retain) / 4
    check(scalarisation(LOSSES, SGD, weight=3.0, log_losses=True), direction, **recorded)


def test_log_random_labels_survive_a_loss_of_zero():
    params = {"a": jnp.array([3000.0, -3000.0]), "b": jnp.array([0.0])}
    method = scalarisation(LOSSES, SGD, weight=3.0, log_losses=True)
    params, _, _ = method.step(params, method.init(params, None), batch())
    assert np.all(np.isfinite(flat(params)))


def test_salun_keeps_masked_weights_still_under_momentum_and_decay():
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(RATE, momentum=0.9))
    saliency = np.abs(true_loss(flat(start()))[1])
    kept = saliency >= np.sort(saliency)[1]
    assert kept.sum() == 2
    theta, velocity = flat(start()), np.zeros(3)
    for _ in range(3):
        grad = (wrong_loss(theta)[1] + 2 * retain_loss(theta)[1]) / 3 + 0.5 * theta
        velocity = 0.9 * velocity + grad
        theta = theta - RATE * velocity * kept
    got, _, _ = stepped(salun(LOSSES, optimizer, weight=2.0), [None] * 3)
    np.testing.assert_allclose(got, theta, rtol=1e-12)
    assert np.array_equal(got[~kept], flat(start())[~kept])


def test_salun_masks_by_the_whole_forget_set():
    one_by_one = jax.tree.map(
        lambda leaf: leaf[:, None], batch()._replace(progress=jnp.zeros(2), forget_share=jnp.zeros(2))
    )
    method = salun(LOSSES, SGD, weight=2.0)
    separate, _ = method.init(start(), one_by_one)
    together, _ = method.init(start(), jax.tree.map(lambda leaf: leaf[None], batch()))
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), separate, together))


def test_l1_sparse_decays_its_penalty():
    theta = flat(start())
    _, grad = retain_loss(theta)
    got, _, _ = stepped(l1_sparse(LOSSES, SGD, penalty=0.3), [batch(progress=0.25)])
    np.testing.assert_allclose(got, theta - RATE * (grad + 0.3 * 0.75 * np.sign(theta)), rtol=1e-12)


def test_scrub_goes_down_on_the_retain_batch_and_up_on_the_forget_batch():
    """With a forget share of a half, every other step goes up."""
    teacher = {"a": jnp.array([-0.2, 0.5]), "b": jnp.array([0.1])}
    temperature, weight = 2.0, 0.5
    losses = label_losses(apply, temperature=temperature)
    method = scrub(losses, SGD, ascent_share=0.5, distillation_weight=weight)

    def distance_grad(theta, x):
        """Of T^2 KL(teacher || student) for two classes: T (p_student - p_teacher) x, a mean."""
        p = lambda params: 1 / (1 + np.exp(-(x @ params[:2] + params[2]) / temperature))
        inputs = np.concatenate([x, np.ones((len(x), 1))], 1)
        return (temperature * (p(theta) - p(flat(teacher)))[:, None] * inputs).mean(0)

    theta = flat(start())
    down = theta - RATE * (retain_loss(theta)[1] + weight * distance_grad(theta, RETAIN_X))
    up = down + RATE * distance_grad(down, FORGET_X)
    again = up - RATE * (retain_loss(up)[1] + weight * distance_grad(up, RETAIN_X))
    late = again - RATE * (retain_loss(again)[1] + weight * distance_grad(again, RETAIN_X))
    params, state = start(), ScrubState(teacher, SGD.init(start()), jnp.zeros([], jnp.int32))
    # The fourth step is due to go up, but late in the run.
    for expected, progress in ((down, 0.0), (up, 0.25), (again, 0.3), (late, 0.5)):
        params, state, seen = method.step(params, state, batch(progress))
        np.testing.assert_allclose(flat(params), expected, rtol=1e-12)
    np.testing.assert_allclose(seen["retain_loss"], retain_loss(again)[0], rtol=1e-6)


def test_scrub_goes_up_as_often_as_the_forget_set_is_large():
    method = scrub(LOSSES, SGD, ascent_share=1.0)
    given = batch()._replace(forget_share=jnp.float32(0.1))
    params, state, ups = start(), method.init(start(), None), 0
    step = jax.jit(method.step)
    for _ in range(50):
        params, state, seen = step(params, state, given)
        ups += bool(np.isnan(seen["retain_loss"]))
    assert ups in (4, 5)  # float32 may round 50 x 0.1 down


def test_scrub_teaches_by_the_original():
    state = scrub(LOSSES, SGD, ascent_share=0.5).init(start(), None)
    np.testing.assert_array_equal(flat(state.teacher), flat(start()))


@pytest.mark.parametrize("name", ["famo_default", "famo_w_lr0.2"])
def test_famo_repeats_the_released_trajectories(name):
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden.json").read_text())
    (case,) = [case for case in golden["cases"] if case["id"] == name]
    problem, settings = case["problem"], case["settings"]
    array = lambda key: jnp.asarray(problem[key], jnp.float64)

    def quadratic(matrix, centre, least):
        away = lambda theta: theta - array(centre)
        return lambda theta, examples: 0.5 * away(theta) @ array(matrix) @ away(theta) + problem[least]

    forget, retain = quadratic("A", "a", "c_U"), quadratic("B", "b", "c_R")
    losses = LossFunctions(forget, retain, divergence=None)

    primal = settings["primal"]
    optimizer = optax.sgd(primal["lr"], momentum=primal["momentum"] or None)
    method = famo(losses, optimizer, weight_rate=settings["w_lr"], decay=settings["gamma"])
    theta = array("theta0")
    state = method.init(theta, None)
    series = {"U": [], "R": [], "w_after_retain": [], "w_after_forget": [], "z_retain_used": []}
    for _ in range(golden["steps"]):
        series["U"].append(forget(theta, None))
        series["R"].append(retain(theta, None))
        series["z_retain_used"].append(jax.nn.softmax(state.logits)[0])
        theta, state, _ = jax.jit(method.step)(theta, state, Batch(None, None, 0.0, 0.0))
        series["w_after_retain"].append(state.logits[0])
        series["w_after_forget"].append(state.logits[1])
    trajectory = case["trajectory"]
    assert series.keys() <= trajectory.keys()
    for key, values in series.items():
        expected = np.array(trajectory[key])
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9 * np.abs(expected).max(), err_msg=key)
    np.testing.assert_allclose(theta, trajectory["theta_end"], rtol=0, atol=1e-9)


def test_gdr_gma_projects_both_ways_tensor_by_tensor():
    theta = flat(start())
    (loss_f, g_f), (loss_r, g_r) = true_loss(theta), retain_loss(theta)
    g_f = -g_f
    both = [(projected_off(r, f), projected_off(f, r)) for r, f in ((g_r[:2], g_f[:2]), (g_r[2:], g_f[2:]))]
    rectified_r, rectified_f = (np.concatenate(parts) for parts in zip(*both, strict=True))
    assert not np.allclose(rectified_f, g_f)
    share = 1 / (1 + np.exp(3 * (loss_r - 0.6)))
    check(
        gdr_gma(LOSSES, SGD, output_bias=the_bias, target=0.6, sharpness=3.0),
        (1 - share) * rectified_r + share * rectified_f,
        multiplier=(1 - share) / share,
        retain_loss=loss_r,
        forget_loss=-loss_f,
    )


def two_logits(params, x):
    """Two outputs with a bias each, and leaves after the bias in the tree's order."""
    return x @ params["z"]["kernel"] + params["z"]["bias"] + 0 * params["z"]["other"].sum()


def test_gdr_gma_clears_the_output_bias_of_the_bank_once_it_is_full():
    params = {"z": {"kernel": jnp.array([[0.7, 0.1], [-0.4, 0.3]]), "bias": jnp.array([0.2, -0.1])}}
    params["z"]["other"] = jnp.zeros(3)
    x, y = FORGET_X, FORGET_Y
    loss = lambda p: -optax.softmax_cross_entropy_with_integer_labels(two_logits(p, x), y).mean()
    forget = np.asarray(jax.grad(loss)(params)["z"]["bias"])
    bias = lambda params: params["z"]["bias"]
    # R far below the target: forget alone.
    method = gdr_gma(label_losses(two_logits), SGD, output_bias=bias, target=10.0)
    two_batches = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch())
    state = method.init(params, two_batches)
    assert state.bank.shape == (2, 2), "one pass over the forget set"
    opposite = np.array([-3.0, 1.0]) * np.sign(forget[0])
    state = state._replace(bank=jnp.stack([opposite, opposite]))
    assert opposite @ forget < 0
    young, _, _ = method.step(params, state, batch())
    full, after, _ = method.step(params, state._replace(taken=jnp.int32(2)), batch())
    retain = jax.grad(
        lambda p: optax.softmax_cross_entropy_with_integer_labels(two_logits(p, RETAIN_X), RETAIN_Y).mean()
    )(params)
    rectified = projected_off(forget, np.asarray(retain["z"]["bias"]))
    moved = lambda new: (params["z"]["bias"] - new["z"]["bias"]) / RATE
    np.testing.assert_allclose(moved(young), rectified, rtol=1e-9)
    # Banked first: the fresh gradient agrees with itself, the old one is in conflict.
    np.testing.assert_allclose(moved(full), projected_off(rectified, opposite), rtol=1e-9)
    np.testing.assert_allclose(after.bank, [forget, opposite], rtol=1e-12)
    np.testing.assert_array_equal(young["z"]["kernel"], full["z"]["kernel"])


def test_pcgrad():
    (forget, g_f), (retain, g_r) = wrong_loss(flat(start())), retain_loss(flat(start()))
    direction = projected_off(g_f, g_r) + projected_off(g_r, g_f)
    check(pcgrad(LOSSES, SGD), direction, forget_loss=forget, retain_loss=retain)


def test_exact_surgery():
    (_, g_f), (_, g_r) = wrong_loss(flat(start())), retain_loss(flat(start()))
    multiplier = (0.05 - g_r @ g_f) / (g_r @ g_r)
    direction = g_f + multiplier * g_r
    assert g_r @ direction == pytest.approx(0.05)
    check(exact_surgery(LOSSES, SGD, demand=0.05), direction, multiplier=multiplier)


def test_pdu():
    theta, multiplier = flat(start()), 1.0
    for _ in range(3):
        loss, g_r = retain_loss(theta)
        theta = theta - RATE * (wrong_loss(theta)[1] + multiplier * g_r)
        multiplier = max(0.0, multiplier + 4.0 * (loss - 0.9))
    got, state, _ = stepped(pdu(LOSSES, SGD, bound=0.9, dual_rate=4.0), [None] * 3)
    np.testing.assert_allclose(got, theta, rtol=1e-12)
    np.testing.assert_allclose(state.multiplier, multiplier, rtol=1e-12)
    assert multiplier == 0


def test_ngdiff():
    (_, g_f), (_, g_r) = true_loss(flat(start())), retain_loss(flat(start()))
    norm = np.linalg.norm
    check(ngdiff(LOSSES, SGD), g_r / norm(g_r) - g_f / norm(g_f), multiplier=norm(g_f) / norm(g_r))


@pytest.mark.parametrize("measure", ["lookahead", "directional"])
def test_eupmu(measure):
    """The first step of Adam moves the multiplier by its rate against the violation's sign."""
    theta = flat(start())
    (_, g_f), (loss, g_r) = wrong_loss(theta), retain_loss(theta)
    direction = (g_f + g_r) / 2
    after = theta - RATE * direction
    rise = retain_loss(after)[0] - loss if measure == "lookahead" else -g_r @ direction
    for demand, sign in ((-rise + 0.1, 1), (-rise - 0.1, -1)):
        got, state, _ = stepped(eupmu(LOSSES, SGD, demand=demand, measure=measure))
        np.testing.assert_allclose(got, after, rtol=1e-12)
        np.testing.assert_allclose(eu.multiplier(state), 1 + sign * 0.05, rtol=1e-6)


@pytest.mark.parametrize("name", list(PEERS))
def test_every_peer_runs_with_its_knobs_traced_and_keeps_its_structure(name):
    """One compiled step serves all settings; a scan over it needs the state's types to be stable."""
    peer = PEERS[name]
    # The study's networks and this model have their output bias in different places.
    others = {"output_bias": the_bias} if name == "GDR-GMA" else {}
    others |= {"baseline": 0.5} if peer.is_told_baseline else {}
    losses = label_losses(apply, peer.forget_loss)

    @jax.jit
    def run(knobs, params):
        rate, *own = knobs
        settings = dict(zip(peer.knobs, own, strict=True)) | others
        method = peer.make(losses, optax.sgd(rate), **settings)
        state = method.init(params, jax.tree.map(lambda leaf: leaf[None], batch()))

        def body(carry, _):
            params, state, seen = method.step(*carry, batch())
            return (params, state), seen

        return jax.lax.scan(body, (params, state), None, length=3)

    ranges = [peer.learning_rate, *peer.knobs.values()]
    ends = []
    for i in (0, 1):
        (params, _), seen = run([jnp.float64(bounds[i]) for bounds in ranges], start())
        assert seen.keys() >= {"forget_loss", "retain_loss", "multiplier"}
        assert np.all(np.isfinite(flat(params)))
        ends.append(flat(params))
    assert not np.array_equal(*ends)
    assert run._cache_size() == 1


def test_forgetting_to_an_unseen_confidence():
    """For two classes the confidence is the margin; beyond a nat from its target the slope is constant."""
    theta = flat(start())
    sign = np.where(FORGET_Y == 0, 1.0, -1.0)
    inputs = np.concatenate([FORGET_X, np.ones((2, 1))], 1)
    away = sign * (inputs @ theta) - UNSEEN
    assert np.abs(away[0]) < 1 < np.abs(away[1])
    loss = (away[0] ** 2 / 2 + np.abs(away[1]) - 0.5) / 2
    g_f = ((np.clip(away, -1, 1) * sign)[:, None] * inputs).mean(0)
    retain, g_r = retain_loss(theta)
    method = scalarisation(label_losses(apply, "unseen confidence"), SGD, weight=3.0)
    check(method, (g_f + 3 * g_r) / 4, forget_loss=loss, retain_loss=retain)


def test_a_budget_counts_from_the_baseline_that_it_is_told():
    """The higher the loss it started from, the less of the budget is spent, and the less it holds back."""
    at = lambda baseline: stepped(eupmu_budget(LOSSES, SGD, budget=0.1, baseline=baseline), [None] * 5)[2]
    loss, _ = retain_loss(flat(start()))
    assert at(loss - 1.0)["multiplier"] > at(loss + 1.0)["multiplier"]


def test_eupmu_with_a_utility_for_each_class():
    """Two retain examples, one of each class: the classes' losses are the examples' own."""
    theta = flat(start())
    of_one = [loss_and_grad(theta, RETAIN_X[i : i + 1], RETAIN_Y[i : i + 1]) for i in (0, 1)]
    (_, g_f), ((_, g_first), (_, g_second)) = wrong_loss(theta), of_one
    method = eupmu(LOSSES, SGD, demand=0.0, classes=3, measure="lookahead")
    got, state, seen = stepped(method)
    direction = (g_f + (g_first + g_second) / 3) / 2
    np.testing.assert_allclose(got, theta - RATE * direction, rtol=1e-12)
    assert eu.multiplier(state).shape == (3,)
    np.testing.assert_allclose(seen["retain_loss"], (of_one[0][0] + of_one[1][0]) / 3, rtol=1e-6)
