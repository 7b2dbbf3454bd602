"""Linen and NNX models, with batch norm and dropout, through eupmu and implicit_surgery."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import eupmu_jax as eu
from eupmu_jax.flax import TrainState, Weighted, lagrangian, saddle_point

X = jax.random.normal(jax.random.key(0), (64, 8))
Y = (X[:, 0] > 0).astype(jnp.int32)
LOOKAHEAD = eu.Tolerance(0.0, measure="lookahead")
BATCH = {"forget": (X[:16], 1 - Y[:16]), "retain": (X[16:], Y[16:])}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(32)(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(2)(x)


class LinenState(TrainState):
    batch_stats: dict


def retain_accuracy(logits):
    return float(jnp.mean(jnp.argmax(logits[16:], -1) == Y[16:]))


def test_linen_with_batch_norm_and_dropout_in_pieces():
    model = Linen()
    variables = model.init(jax.random.key(1), X, train=False)
    surgery = eu.implicit_surgery(eu.Tolerance(-0.01))
    state = LinenState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.chain(surgery, optax.adam(1e-2)),
    )

    @jax.jit
    def step(state, batch, key):
        def losses_fn(params, batch):
            x = jnp.concatenate([batch["forget"][0], batch["retain"][0]])
            logits, changed = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            losses = eu.Losses(
                cross_entropy(logits[:16], batch["forget"][1]), cross_entropy(logits[16:], batch["retain"][1])
            )
            return losses, changed["batch_stats"]

        value_and_grad = surgery.value_and_grad(losses_fn, has_aux=True)
        (losses, batch_stats), grads = value_and_grad(state.params, batch, state.opt_state)
        return state.apply_gradients(
            grads=grads, extra_args={"losses": losses}, batch_stats=batch_stats
        ), losses

    before = state
    for key in jax.random.split(jax.random.key(2), 100):
        state, losses = step(state, BATCH, key)
    assert step._cache_size() == 1
    assert int(state.step) == 100
    assert not np.allclose(
        state.batch_stats["BatchNorm_0"]["mean"], before.batch_stats["BatchNorm_0"]["mean"]
    )
    assert int(eu.surgery_info(state.opt_state).skipped_steps) == 0
    logits = model.apply({"params": state.params, "batch_stats": state.batch_stats}, X, train=False)
    assert retain_accuracy(logits) > 0.9
    assert float(losses.retain) < 0.3


def test_linen_with_dropout_through_eupmu_and_train_state():
    model = Linen()
    variables = model.init(jax.random.key(1), X, train=False)

    def losses_fn(params, batch):
        def loss(part, key):
            x, labels = part
            logits = model.apply({"params": params, "batch_stats": variables["batch_stats"]}, x, train=False)
            noise = 0.01 * jax.random.normal(key, logits.shape)
            return cross_entropy(logits + noise, labels)

        keys = jax.random.split(batch["key"])
        return eu.Losses(loss(batch["forget"], keys[0]), loss(batch["retain"], keys[1]))

    tx = eu.eupmu(losses_fn, optax.adam(1e-2), LOOKAHEAD)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    step = jax.jit(lambda state, batch: state.apply_gradients(extra_args={"batch": batch}))
    first = losses_fn(state.params, BATCH | {"key": jax.random.key(0)})
    for i in range(60):
        state = step(state, BATCH | {"key": jax.random.key(i)})
    last = eu.surgery_info(state.opt_state)
    assert float(last.retain_loss) < float(first.retain)
    assert float(last.forget_loss) < float(first.forget)
    assert int(state.step) == 60


def test_train_state_serves_transformations_without_extra_args():
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5))
    state = state.apply_gradients(grads={"w": jnp.ones(2)})
    np.testing.assert_allclose(state.params["w"], 0.5)
    with pytest.raises(TypeError, match="batch_stats"):
        state.apply_gradients(grads={"w": jnp.ones(2)}, batch_stats={})


def test_train_state_refuses_what_it_would_not_serve():
    with pytest.raises(TypeError, match="gradient_transformation"):
        TrainState.create(apply_fn=None, params={}, tx=optax.MultiSteps(optax.sgd(0.1), 2))
    scales = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.ones(())}}
    with pytest.raises(ValueError, match="fp8"):
        TrainState.create(apply_fn=None, params=scales, tx=optax.sgd(0.1))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(nnx.relu(self.hidden(x)))))


def nnx_losses(model, batch):
    x = jnp.concatenate([batch["forget"][0], batch["retain"][0]])
    logits = model(x)
    return eu.Losses(
        cross_entropy(logits[:16], batch["forget"][1]), cross_entropy(logits[16:], batch["retain"][1])
    )


def test_nnx_with_batch_norm_and_dropout_in_pieces():
    model = NNX(nnx.Rngs(0))
    surgery = eu.implicit_surgery(eu.Tolerance(-0.01))
    optimizer = nnx.Optimizer(model, optax.chain(surgery, optax.adam(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def losses_fn(params, batch):
            model = nnx.merge(graphdef, params, rest, copy=True)
            losses = nnx_losses(model, batch)
            return losses, nnx.state(model, nnx.Not(nnx.Param))

        value_and_grad = surgery.value_and_grad(losses_fn, has_aux=True)
        state = nnx.as_pure(optimizer.opt_state)
        (losses, rest), grads = value_and_grad(params, batch, state)
        nnx.update(model, rest)
        optimizer.update(model, grads, losses=losses)
        return losses

    mean = model.norm.mean[...]
    for _ in range(100):
        losses = step(model, optimizer, BATCH)
    assert not np.allclose(model.norm.mean[...], mean)
    info = eu.surgery_info(nnx.as_pure(optimizer.opt_state))
    assert int(info.skipped_steps) == 0
    assert float(losses.retain) < 0.3
    model.eval()
    assert retain_accuracy(model(X)) > 0.9


def test_nnx_through_eupmu():
    model = NNX(nnx.Rngs(0))
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    losses_fn = lambda params, batch: nnx_losses(nnx.merge(graphdef, params, rest), batch)
    tx = eu.eupmu(losses_fn, optax.adam(1e-2), LOOKAHEAD)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    first = losses_fn(params, BATCH)
    for _ in range(50):
        params, state = step(params, state, BATCH)
    nnx.update(model, params)
    assert float(nnx_losses(model, BATCH).retain) < float(first.retain)
    assert step._cache_size() == 1


@pytest.mark.parametrize("through", ["eupmu", "implicit"])
def test_lora_filter_on_nnx_moves_the_adapters_only(through):
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.LoRALinear(8, 32, lora_rank=2, rngs=rngs)
            self.out = nnx.Linear(32, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    model = Adapted(nnx.Rngs(0))
    surgery = eu.implicit_surgery(eu.Tolerance(0.0))
    graphdef, _, frozen = nnx.split(model, nnx.LoRAParam, ...)
    losses_fn = lambda adapters, batch: nnx_losses(nnx.merge(graphdef, adapters, frozen), batch)
    adam = optax.adam(1e-2)
    tx = eu.eupmu(losses_fn, adam, LOOKAHEAD) if through == "eupmu" else optax.chain(surgery, adam)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    first = nnx_losses(model, BATCH)
    weights = jnp.array(model.hidden.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        if through == "eupmu":
            optimizer.update(model, None, batch=BATCH)
        else:
            adapters, state = nnx.state(model, nnx.LoRAParam), nnx.as_pure(optimizer.opt_state)
            losses, grads = surgery.value_and_grad(losses_fn)(adapters, BATCH, state)
            optimizer.update(model, grads, losses=losses)

    for _ in range(30):
        step(model, optimizer)
    last = nnx_losses(model, BATCH)
    np.testing.assert_array_equal(model.hidden.kernel[...], weights)
    assert float(last.forget + last.retain) < float(first.forget + first.retain)


# The Lagrangian: a trainer that knows one loss and one optimiser.


class Plain(nnx.Module):
    def __init__(self, rngs, adapted):
        self.hidden = (
            nnx.LoRALinear(8, 32, lora_rank=2, rngs=rngs) if adapted else nnx.Linear(8, 32, rngs=rngs)
        )
        self.out = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(module, optimizer, batch):
    """As trainers write it."""
    loss, grads = nnx.value_and_grad(lagrangian(nnx_losses), argnums=nnx.DiffState(0, optimizer.wrt))(
        module, batch
    )
    optimizer.update(module, grads)
    return loss


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.LoRAParam])
def test_nnx_through_a_trainer_of_one_loss(wrt):
    """Equal to implicit_surgery on the same leaves, and the filters of trainers take the weights along."""
    budget, inner = eu.Budget(0.1, baseline=0.5), optax.sgd(0.1, momentum=0.9)
    module = Weighted(Plain(nnx.Rngs(0), adapted=wrt is nnx.LoRAParam), budget)
    optimizer = nnx.Optimizer(module, saddle_point(inner, budget), wrt=wrt)
    assert type(module.weights) is wrt, "trainers look for adapters, to train them alone"
    graphdef, params, rest = nnx.split(module.model, wrt, ...)
    params = jax.tree.map(jnp.copy, params)
    frozen = jax.tree.map(jnp.copy, nnx.state(module.model, nnx.Not(wrt)))

    losses_fn = lambda params, batch: nnx_losses(nnx.merge(graphdef, params, rest), batch)
    surgery = eu.implicit_surgery(budget)
    tx = optax.chain(surgery, inner)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        losses, grads = surgery.value_and_grad(losses_fn)(params, BATCH, state)
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        loss = train_step(module, optimizer, BATCH)
        params, state = step(params, state)
    info = eu.surgery_info(nnx.as_pure(optimizer.opt_state))
    ours = nnx.as_pure(nnx.state(module.model, wrt)), info
    theirs = nnx.as_pure(params), eu.surgery_info(state)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(nnx.state(module.model, nnx.Not(wrt)), frozen)
    weights = np.array([1, info.multiplier]) / (1 + info.multiplier)
    np.testing.assert_allclose(module.weights[...], weights, rtol=1e-6)
    assert not np.allclose(weights, 0.5)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(module(X), module.model(X))


def test_nnx_accumulates_with_batch_norm_and_dropout():
    """MultiSteps, as a trainer wraps whatever optimiser it is given; statistics move in every micro-batch."""
    budget = eu.Budget(0.1, baseline=0.2)
    module = Weighted(NNX(nnx.Rngs(0)), budget)
    tx = optax.MultiSteps(saddle_point(optax.adam(1e-2), budget), 2)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    mean = jnp.array(module.model.norm.mean[...])
    kernel = jnp.array(module.model.out.kernel[...])
    moved = []
    for _ in range(160):
        train_step(module, optimizer, BATCH)
        moved.append(not np.array_equal(module.model.out.kernel[...], kernel))
        kernel = jnp.array(module.model.out.kernel[...])
    assert moved == [False, True] * 80
    assert not np.allclose(module.model.norm.mean[...], mean)
    info = eu.surgery_info(nnx.as_pure(optimizer.opt_state))
    assert int(info.skipped_steps) == 0
    assert float(info.retain_loss) < 0.5
    module.eval()
    assert retain_accuracy(module(X)) > 0.85


def test_nnx_says_what_leaves_the_weights_out():
    module = Weighted(Plain(nnx.Rngs(0), adapted=False), eu.Budget(0.1))
    tx = saddle_point(optax.sgd(0.1), eu.Budget(0.1))
    with pytest.raises(KeyError, match="weights"):
        nnx.Optimizer(module, tx, wrt=nnx.PathContains("model"))
    state = tx.init(nnx.state(module, nnx.Param))
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    with pytest.raises(ValueError, match="leave log_losses out"):
        Weighted(module.model, eu.Tolerance(0.0, log_losses=True))
