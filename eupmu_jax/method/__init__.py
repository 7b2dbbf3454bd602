"""The method: losses, gradient, constraint, controller and transformations. Needs jax and optax alone."""
