"""What one step of a method costs, read off the compiled program."""

from collections.abc import Callable
from typing import Any

import jax


def step_cost(step: Callable[..., Any], *args: Any) -> dict[str, float]:
    r"""FLOPs and bytes of one call of a step as XLA compiled it; nothing is executed.

    .. math:: \text{peak} = \text{arguments} + \text{outputs} + \text{temporaries} - \text{aliased}

    Aliased are the bytes of arguments that outputs are written over, which takes donation: pass
    ``jax.jit(step, donate_argnums=...)`` as it will run. The peak is that of the step's own buffers, on
    one device; the program itself and arrays it does not take are not in it. All figures >= 0, lower
    is better. A run costs these times its steps, and Retrain's is compared so.

    How many gradients a step costs is the ratio of its FLOPs to those of one gradient of the two
    losses on the same batch, as below: 1 plus the optimiser's arithmetic for linear scalarisation.
    It goes by shapes alone, unlike a run time, and what the compiler shares is counted once: the two
    gradients of losses on disjoint examples cost no more than that of their sum.

    XLA counts the body of a loop (``jax.lax.scan``, ``while_loop``, ``fori_loop``) once, whatever the
    number of iterations, and custom kernels not at all; both branches of a ``jax.lax.cond`` are
    compiled, only the dearer counts. Compare steps that loop alike, on one backend and jax version.

    Args:
      step: a function to compile, or one that is compiled by ``jax.jit`` already.
      *args: its arguments, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      {"flops", "bytes_accessed", "temporary_bytes", "peak_bytes"}: floating-point operations;
      bytes read and written by all operations of the program; bytes of temporaries; bytes of the peak.
      NaN where the backend does not say.

    Raises:
      TypeError: what tracing the step with these arguments raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from eupmu_jax.evaluation import step_cost
      >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
      >>> both = lambda w, batch: loss(w, batch["retain"]) - loss(w, batch["forget"])
      >>> descend = lambda w, batch: w - 0.1 * jax.grad(both)(w, batch)
      >>> look_ahead = lambda w, batch: loss(descend(w, batch), batch["retain"])
      >>> x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
      >>> args = jax.ShapeDtypeStruct((64, 64), jnp.float32), {"retain": x, "forget": x}
      >>> flops = lambda step: step_cost(step, *args)["flops"]
      >>> gradient = flops(jax.grad(both))
      >>> round(flops(descend) / gradient, 2), round(flops(look_ahead) / gradient, 2)
      (1.01, 1.26)

    Source: XLA's cost and memory analyses of a compiled program.
    """
    jitted: Any = step if hasattr(step, "lower") else jax.jit(step)
    compiled = jitted.lower(*args).compile()
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    size = lambda kind: float(getattr(memory, f"{kind}_size_in_bytes", "nan"))
    return {
        "flops": float(costs.get("flops", "nan")),
        "bytes_accessed": float(costs.get("bytes accessed", "nan")),
        "temporary_bytes": size("temp"),
        "peak_bytes": size("argument") + size("output") + size("temp") - size("alias"),
    }
