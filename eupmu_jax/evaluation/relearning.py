"""The relearning attack: how fast does fine-tuning bring back what was forgotten?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def relearning_curve(
    loss_fn: Callable[[Any, Any], Any],
    score_fn: Callable[[Any], Any],
    params: Any,
    batches: Any,
    optimizer: optax.GradientTransformation,
    every: int = 1,
) -> Any:
    r"""A score, usually the forget accuracy, along a fine-tuning of the unlearned model.

    .. math::
      \theta_{t+1} = \theta_t + \mathrm{optimizer}(\nabla L(\theta_t; b_t)), \qquad
      s_j = \mathrm{score}(\theta_{j \cdot \text{every}})

    Two attacks, by what is in the batches:

    - retain data alone: whatever the forget score gains was still in the weights;
    - a few forget examples: score the *others*, or memorising the few looks like relearning.

    Of a forget accuracy in percent the range is [0, 100]. Run Retrain with the same batches and
    optimiser. Its curve stays flat on retain data, and on forget examples rises as slowly as learning
    something new; a method passes if its curve is no steeper, whatever it starts from. A steeper one
    means hidden, not forgotten.

    One nest of scans: compose with ``jax.jit`` and ``jax.vmap`` (over params for methods and seeds,
    over batches for draws of the forget examples).

    Args:
      loss_fn: pure function (params, batch) -> scalar.
      score_fn: pure function params -> array or pytree of arrays, on data of its own.
      params: the unlearned model's, a pytree of floating arrays.
      batches: pytree of arrays [steps, ...], steps >= 1, one slice per step.
      optimizer: any optax transformation, started afresh.
      every: steps between scores, a divisor of steps.

    Returns:
      The scores with a leading axis [steps // every + 1]: before the first step and after each
      ``every`` steps.

    Raises:
      ValueError: batches without a common leading axis >= 1; steps that are no multiple of every;
        every < 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from eupmu_jax.evaluation import relearning_curve
      >>> squared = lambda w, target: jnp.sum((w - target) ** 2) / 2
      >>> forget_score = lambda w: w[0]
      >>> curve = relearning_curve(squared, forget_score, jnp.zeros(2), jnp.ones((4, 2)), optax.sgd(0.5), 2)
      >>> curve.tolist()
      [0.0, 0.75, 0.9375]

    Source: Siddiqui et al., arXiv 2505.22310 (retain data alone).
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(f"batches must be arrays [steps, ...] with one steps >= 1, got {sorted(lengths)}")
    ((steps,),) = lengths
    if every < 1 or steps % every:
        raise ValueError(f"steps must be a multiple of every >= 1, got {steps} steps and every={every}")
    chunks = jax.tree.map(lambda x: jnp.reshape(x, (-1, every, *jnp.shape(x)[1:])), batches)

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    def run_chunk(carry, chunk):
        carry, _ = jax.lax.scan(step, carry, chunk)
        return carry, score_fn(carry[0])

    start = jax.tree.map(jnp.asarray, params)
    _, later = jax.lax.scan(run_chunk, (start, optimizer.init(start)), chunks)
    return jax.tree.map(lambda s, rest: jnp.concatenate([jnp.asarray(s)[None], rest]), score_fn(start), later)
