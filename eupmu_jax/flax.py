"""What is Flax-specific: a Linen TrainState that hands extra arguments on, and for NNX filters and a module.

The module is for trainers that take one loss and one optimiser: it is trained as `eu.Weighted` is. Where you
own the step, the transformations need nothing for NNX: ``nnx.Optimizer.update(model, grads, **extra_args)``
forwards extra arguments, and takes None for the ``grads`` of `eupmu`.
``multiplier(nnx.as_pure(optimizer.opt_state))`` reads the state.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from eupmu_jax.method import lagrangian as method
from eupmu_jax.method.constraints import Constraint, check_transformation
from eupmu_jax.method.layouts import beside
from eupmu_jax.method.losses import Losses
from eupmu_jax.method.types import Numbers, PyTree
from eupmu_jax.run.leaves import name_of


class TrainState(train_state.TrainState):
    """flax.training.train_state.TrainState whose ``apply_gradients`` forwards extra arguments.

    Attributes:
      step: int32 [], the number of updates so far.
      apply_fn: the model's ``apply``; not used here.
      params: pytree of floating arrays.
      tx: the transformation.
      opt_state: its state; `surgery_info` and `multiplier` read it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> from eupmu_jax.flax import TrainState
      >>> losses_fn = lambda params, batch: eu.Losses((params["w"] - 1) ** 2, (params["w"] - batch) ** 2)
      >>> tx = eu.eupmu(losses_fn, optax.sgd(0.1), eu.Tolerance(0.01))
      >>> state = TrainState.create(apply_fn=None, params={"w": jnp.array(0.5)}, tx=tx)
      >>> state = state.apply_gradients(extra_args={"batch": jnp.array(0.0)})
      >>> int(state.step), float(eu.surgery_info(state.opt_state).retain_loss)
      (1, 0.25)
    """

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any] | None,
        params: PyTree,
        tx: optax.GradientTransformation,
        **kwargs: Any,
    ) -> Self:
        """A state before the first update.

        Unlike Flax's its step is an array, so that the second update compiles nothing again.

        Args:
          apply_fn: the model's ``apply``, kept for the caller; or None.
          params: pytree of floating arrays.
          tx: the transformation.
          **kwargs: values of the fields that a subclass adds.

        Returns:
          The state with step 0 and the initial opt_state.

        Raises:
          TypeError: tx is no transformation (of an optax.MultiSteps give its gradient_transformation());
            a keyword that is no field of the state.
          ValueError: params with Flax's collection of fp8 scales, which are no gradient's.
        """
        check_transformation(tx, "tx")
        if isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params:
            raise ValueError(
                f"params hold {OVERWRITE_WITH_GRADIENT!r}, the scales of fp8: train without them"
            )
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        step, opt_state = beside(params, (jnp.zeros([], jnp.int32), state.opt_state))
        return state.replace(step=step, opt_state=opt_state)

    def apply_gradients(
        self,
        *,
        grads: PyTree = None,
        extra_args: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> Self:
        """A new state after one update.

        Args:
          grads: gradients like params; None for a transformation that computes its own, as `eupmu` does.
          extra_args: keyword arguments of ``tx.update``, such as batch (`eupmu`), losses
            (`implicit_surgery`) or retain_grads (`explicit_surgery`).
          **kwargs: new values of other fields of the state, as in Flax: batch statistics, a PRNG key.

        Returns:
          The state with step + 1, updated params and opt_state, and the given fields replaced.

        Raises:
          TypeError: a keyword that is no field of the state. What ``tx.update`` raises comes through.
        """
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra_args)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)


def trainable(params: nnx.State, *filters: Any) -> Callable[[str], bool]:
    """The ``trainable`` of `unlearn` for NNX: which leaves belong to variables that a filter accepts.

    Args:
      params: the state that `unlearn` is given, for instance of ``nnx.split(model)``.
      *filters: NNX filters, of which one must accept: ``nnx.LoRAParam``, ``nnx.PathContains("head")``, ...

    Returns:
      A function: path of a leaf, such as "layers.0.lora_a.value", -> whether it is trained.

    Raises:
      ValueError: no variable that a filter accepts.

    Example:
      >>> from flax import nnx
      >>> from eupmu_jax.flax import trainable
      >>> base = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      >>> params = nnx.state(nnx.LoRA(4, 2, 4, base_module=base, rngs=nnx.Rngs(0)))
      >>> is_trained = trainable(params, nnx.LoRAParam)
      >>> is_trained("lora_a.value"), is_trained("base_module.kernel.value")
      (True, False)
    """
    accepts = nnx.filterlib.to_predicate(nnx.filterlib.Any(*filters))
    is_variable = lambda node: isinstance(node, nnx.Variable)
    chosen = set()
    for path, variable in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        if accepts(tuple(key.key if hasattr(key, "key") else key.idx for key in path), variable):
            chosen |= {name_of((*path, *rest)) for rest, _ in jax.tree_util.tree_leaves_with_path(variable)}
    if not chosen:
        raise ValueError(f"params has no variable that {filters} accept")
    return chosen.__contains__


class Weighted(nnx.Module):
    """An NNX module of a model and of the weights of its losses: `eu.weighted` for trainers of modules.

    It has the attributes ``model`` and ``weights``, and calling it calls the model. The weights are an
    ``nnx.LoRAParam`` where the model has one, else an ``nnx.Param``: add adapters first.

    Args:
      model: the module to train; it is shared, not copied.
      constraint: that of `saddle_point`.
      initial_multiplier: that of `saddle_point`.

    Raises:
      TypeError, ValueError: as `eu.weighted`.

    Example:
      >>> from flax import nnx
      >>> import eupmu_jax as eu
      >>> from eupmu_jax.flax import Weighted
      >>> module = Weighted(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), eu.Budget(0.1))
      >>> module.weights[...]
      Array([0.5, 0.5], dtype=float32)
    """

    def __init__(self, model: nnx.Module, constraint: Constraint, *, initial_multiplier: Numbers = 1.0):
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        _, weights = method.weighted(params, constraint, initial_multiplier=initial_multiplier)
        self.model = model
        # Trainers choose what they train by its kind: nnx.LoRAParam, which is an nnx.Param, where they find
        # one, and else nnx.Param. So the weights are of the kind that is found without them.
        adapted = any(isinstance(node, nnx.LoRAParam) for _, node in nnx.iter_graph(model))
        self.weights = (nnx.LoRAParam if adapted else nnx.Param)(weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def lagrangian(losses_fn: Callable[[Any, Any], Losses]) -> Callable[[Weighted, PyTree], jax.Array]:
    """One scalar loss for trainers of NNX modules: `eu.lagrangian` of a `Weighted` module.

    Args:
      losses_fn: function (model, batch) -> `eu.Losses`, the losses themselves and not their logarithms.

    Returns:
      A function (module, batch) -> [], float32 or wider, for ``nnx.value_and_grad``. What the model changes
      in itself, such as batch statistics, it changes as in any loss of NNX.

    Raises:
      TypeError, ValueError: as `eu.lagrangian`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import eupmu_jax as eu
      >>> from eupmu_jax.flax import Weighted, lagrangian
      >>> losses_fn = lambda model, batch: eu.Losses(jnp.sum(model(batch) ** 2), jnp.float32(2.0))
      >>> module = Weighted(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), eu.Budget(0.1))
      >>> nnx.grad(lagrangian(losses_fn))(module, jnp.zeros((1, 3)))["weights"][...]
      Array([0., 2.], dtype=float32)
    """
    loss_fn = method.lagrangian(losses_fn)
    return lambda module, batch: loss_fn(method.Weighted(module.model, module.weights[...]), batch)


def saddle_point(
    inner: optax.GradientTransformation, constraint: Constraint, *, initial_multiplier: Numbers = 1.0
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a `Weighted` module: `eu.saddle_point` of its state.

    Args:
      inner: the optimiser of the model's parameters.
      constraint: as for `eu.saddle_point`.
      initial_multiplier: as for `eu.saddle_point`.

    Returns:
      A GradientTransformationExtraArgs for ``nnx.Optimizer(module, tx, wrt=...)``, where ``wrt`` is
      ``nnx.Param``, for a model with adapters ``nnx.LoRAParam``, or another filter that accepts the weights.
      Then ``optimizer.update(module, grads)``, and ``eu.surgery_info(nnx.as_pure(optimizer.opt_state))``.

    Raises:
      KeyError: a state without the weights: ``wrt`` does not accept them, or the module is no `Weighted`.
      TypeError, ValueError: as `eu.saddle_point`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import eupmu_jax as eu
      >>> from eupmu_jax.flax import Weighted, lagrangian, saddle_point
      >>> losses_fn = lambda model, x: eu.Losses(jnp.mean(model(x) ** 2), jnp.mean((model(x) - 1) ** 2))
      >>> module = Weighted(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), eu.Tolerance(0.01))
      >>> tx = saddle_point(optax.sgd(0.1), eu.Tolerance(0.01))
      >>> optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
      >>> grads = nnx.grad(lagrangian(losses_fn))(module, jnp.zeros((4, 3)))
      >>> updates = optimizer.update(module, grads)
      >>> float(eu.surgery_info(nnx.as_pure(optimizer.opt_state)).retain_loss)
      1.0
    """
    tx = method.saddle_point(inner, constraint, initial_multiplier=initial_multiplier)

    def as_weighted(state: Any) -> method.Weighted:
        return method.Weighted(state["model"], state["weights"])

    def init(params):
        # Optax's own tools call this with a placeholder for the parameters.
        return tx.init(as_weighted(params) if isinstance(params, nnx.State) else params)

    def update(updates, state, params=None, **extra_args):
        updates, state = tx.update(as_weighted(updates), state, as_weighted(params), **extra_args)
        moves = cast(method.Weighted, updates)
        return nnx.State({"model": moves.params.raw_mapping, "weights": moves.weights}), state

    return optax.GradientTransformationExtraArgs(init, update)
