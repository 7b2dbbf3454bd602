"""What is Flax-specific: a Linen TrainState that hands extra arguments to the transformation.

NNX needs nothing: ``nnx.Optimizer.update(model, grads, **extra_args)`` forwards them (``grads`` may
be None for `eupmu`), and ``multiplier(nnx.as_pure(optimizer.opt_state))`` reads its state.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """flax.training.train_state.TrainState whose ``apply_gradients`` forwards extra arguments.

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

    Source: ours.
    """

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any) -> "TrainState":
        """As in Flax, but with ``step`` an array, so that the second step compiles nothing anew."""
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        return state.replace(step=jnp.zeros([], jnp.int32))

    def apply_gradients(
        self,
        *,
        grads: Any = None,
        extra_args: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> "TrainState":
        """A new state after one update.

        Args:
          grads: gradients like params; None for a transformation that computes its own.
          extra_args: keyword arguments of ``tx.update``: losses (`implicit_surgery`), batch (`eupmu`),
            retain_grads (`explicit_surgery`), ...
          **kwargs: new values of other fields of the state, as in Flax: batch statistics, a PRNG key.

        Returns:
          The state with step + 1, updated params and opt_state, and the given fields replaced.

        Raises:
          TypeError: a keyword that is no field of the state. And what ``tx.update`` raises.
        """
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra_args)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
