"""FLOPs of a function from its jaxpr: matrix products only, a loop's body as often as it runs."""

import math
from typing import Any

from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr


def flops_of(jaxpr: Any) -> float:
    """`matmul_flops` of what its results need: a compiler leaves the rest out."""
    return matmul_flops(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def matmul_flops(jaxpr: Any) -> float:
    """2 m n k of every dot_general, recomputation included; of a conditional, the dearest branch."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracting)
            continue
        inner = [matmul_flops(sub) for sub in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += equation.params.get("length", 1) * sum(inner)
    return total
