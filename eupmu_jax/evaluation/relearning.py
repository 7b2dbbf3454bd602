"""The relearning attack: how fast does fine-tuning bring back what was forgotten?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from eupmu_jax.method.trees import leading_length
from eupmu_jax.method.types import PyTree


def relearning_curve(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    score_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    batches: PyTree,
    optimizer: optax.GradientTransformation,
    every: int = 1,
) -> PyTree:
    r"""A score, usually the forget accuracy, along a fine-tuning of the unlearned model.

    .. math::
      \theta_{t+1} = \theta_t + \mathrm{optimizer}(\nabla L(\theta_t; b_t)), \qquad
      s_j = \mathrm{score}(\theta_{j \cdot \text{every}})

    The batches make it one of two attacks:

    - They hold retain data alone. Whatever the forget score gains was still in the weights.
    - They hold a few forget examples. Then score the *other* forget examples: memorising the few would look
      like relearning.

    Compare with Retrain under the same batches and optimiser. Its curve stays flat on retain data. On
    forget examples it rises as slowly as for anything new. A method passes if its curve is no steeper,
    wherever it starts. A steeper curve means that the forget set was hidden, not forgotten. A forget
    accuracy in percent has the range [0, 100].

    The function is a nest of scans, so ``jax.jit`` and ``jax.vmap`` apply to it: over params for methods and
    seeds, over batches for draws of the forget examples.

    Args:
      loss_fn: pure function (params, batch) -> scalar.
      score_fn: pure function params -> array or pytree of arrays. It brings its own data.
      params: the unlearned model's parameters, a pytree of floating arrays.
      batches: pytree of arrays [steps, ...], steps >= 1, with one slice for each step.
      optimizer: any optax transformation. It starts from its initial state.
      every: number of steps between scores, a divisor of steps.

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
    steps = leading_length(batches)
    if steps is None:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
        raise ValueError(f"batches must be arrays [steps, ...] with one steps >= 1, got shapes {shapes}")
    if every < 1 or steps % every:
        raise ValueError(f"steps must be a multiple of every >= 1, got {steps} steps and every={every}")
    chunks = jax.tree.map(lambda x: jnp.reshape(x, (-1, every, *jnp.shape(x)[1:])), batches)

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    def run_chunk(carry, chunk):
        (params, state), _ = jax.lax.scan(step, carry, chunk)
        return (params, state), score_fn(params)

    start = jax.tree.map(jnp.asarray, params)
    _, later = jax.lax.scan(run_chunk, (start, optimizer.init(start)), chunks)
    with_first = lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest])
    return jax.tree.map(with_first, score_fn(start), later)
