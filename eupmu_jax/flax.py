"""What is Flax-specific: a Linen TrainState that hands extra arguments on, and NNX filters for `unlearn`.

The transformations need nothing for NNX. ``nnx.Optimizer.update(model, grads, **extra_args)`` forwards extra
arguments, and takes None for the ``grads`` of `eupmu`. ``multiplier(nnx.as_pure(optimizer.opt_state))``
reads the state.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

from eupmu_jax.method.types import PyTree
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
          TypeError: a keyword that is no field of the state.
        """
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        return state.replace(step=jnp.zeros([], jnp.int32))

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
