"""What one step of a method costs, as the compiled program says."""

from collections.abc import Callable

import jax
from jax.stages import Compiled

from eupmu_jax.method.types import PyTree


def step_cost(step: Callable[..., PyTree], *args: PyTree) -> dict[str, float]:
    r"""FLOPs and bytes of one call of a step as XLA compiled it; nothing is executed.

    .. math:: \text{peak} = \text{arguments} + \text{outputs} + \text{temporaries} - \text{aliased}

    The aliased bytes are those of arguments that outputs overwrite. Arguments must be donated for that: pass
    ``jax.jit(step, donate_argnums=...)`` as it will run. The peak covers the step's own buffers on one
    device. It leaves out the program itself, and arrays that the step does not take. All figures are >= 0,
    and lower is better. A run costs these figures times its number of steps.

    Divide the FLOPs of a step by those of one gradient of the sum of the losses on the same batch, as
    below, to count gradients: linear scalarisation costs 1 plus the optimiser's arithmetic. The ratio
    depends on shapes alone, unlike a run time. What the compiler shares is counted once: the two gradients
    of losses on disjoint examples cost no more than that of their sum.

    XLA counts the body of a loop (``jax.lax.scan``, ``while_loop``, ``fori_loop``) once, whatever the number
    of iterations. It does not count custom kernels. Of the branches of a ``jax.lax.cond`` it counts the
    dearest. So compare steps that loop alike, on one backend and one jax version.

    Args:
      step: a function, or the result of ``jax.jit``.
      *args: its arguments, pytrees of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      "flops": floating-point operations.
      "bytes_accessed": bytes that all operations of the program read and write.
      "temporary_bytes": bytes of temporaries.
      "peak_bytes": bytes of the peak.
      Each is a float, NaN where the backend does not say.

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
      >>> bool(flops(descend) < 1.02 * gradient), bool(1.2 < flops(look_ahead) / gradient < 1.3)
      (True, True)

    Source: XLA's cost and memory analyses of a compiled program.
    """
    lower = getattr(step, "lower", None) or jax.jit(step).lower
    return program_cost(lower(*args).compile())


def program_cost(compiled: Compiled) -> dict[str, float]:
    """What `step_cost` returns, of a program that is compiled already."""
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    size = lambda kind: float(getattr(memory, f"{kind}_size_in_bytes", "nan"))
    return {
        "flops": float(costs.get("flops", "nan")),
        "bytes_accessed": float(costs.get("bytes accessed", "nan")),
        "temporary_bytes": size("temp"),
        "peak_bytes": size("argument") + size("output") + size("temp") - size("alias"),
    }
