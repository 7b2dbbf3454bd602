"""Dots and projections of gradients, over whole trees or tensor by tensor."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def without_conflict(gradient: jax.Array, other: jax.Array) -> jax.Array:
    """`gradient` less its component along `other` where they point against each other."""
    dot, size = jnp.vdot(gradient, other), jnp.vdot(other, other)
    return gradient - jnp.where(size > 0, jnp.minimum(dot, 0) / jnp.where(size > 0, size, 1), 0) * other


def tree_without_conflict(gradient: Any, other: Any) -> Any:
    """The same of whole gradients, as one vector each."""
    dot, size = (jnp.asarray(optax.tree.vdot(g, other)) for g in (gradient, other))
    along = jnp.where(size > 0, jnp.minimum(dot, 0) / jnp.where(size > 0, size, 1), 0)
    return jax.tree.map(lambda g, o: g - along * o, gradient, other)
