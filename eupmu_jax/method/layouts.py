"""A compiled training step, on one device or on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from eupmu_jax.method.constraints import check_transformation
from eupmu_jax.method.state import SurgeryInfo, surgery_info, surgery_state
from eupmu_jax.method.types import PyTree


def training_step(
    tx: optax.GradientTransformation, params: PyTree, mesh: Mesh | None = None, *, batch_spec: Any = None
) -> tuple[Callable[..., tuple[Any, Any, SurgeryInfo]], Any, Any]:
    r"""A compiled step of `eupmu`, and where it starts: the same on a laptop and, with ``mesh``, on a mesh.

    .. math:: (\theta_t, s_t, \text{batch}_t) \mapsto (\theta_{t+1}, s_{t+1}, \text{what was seen at } t)

    On a mesh the step is ``jax.jit`` of the same computation on sharded arrays, so that the losses are
    those of the whole batch and there is nothing to reduce: it equals the step on one device up to
    rounding. No losses_fn needs to know about devices. (Inside shard_map or pmap there is no use for
    this: call the transformation with ``axis_name`` there.)

    Args:
      tx: a transformation whose ``update`` takes ``batch``: ``eupmu(losses_fn, inner, constraint)``, alone or
        inside a chain.
      params: pytree of floating arrays. Those that already are sharded on the mesh stay so (FSDP,
        tensor parallelism: place them with ``jax.device_put`` first), the others are replicated.
        They are copied: the caller's stay valid.
      mesh: a jax.sharding.Mesh, with Auto or Explicit axes and of any number of processes; None for the
        default device.
      batch_spec: how the leaves of a batch are split on the mesh: a PartitionSpec or a pytree prefix
        of them. None: the first axis of every leaf along the first axis of the mesh, scalars
        replicated.

    Returns:
      (step, params, state). ``step(params, state, batch, **extra_args)`` -> (params, state,
      surgery_info(state)), compiled once (twice where the batch alone is committed to a device); params
      and state are donated, so keep what it returns.
      Arrays of a batch that are not on the mesh yet are put there; of several processes each gives its
      own rows.

    Raises:
      TypeError: tx is no transformation, or mesh no Mesh. And what tx.update raises.
      ValueError: no state of `eupmu` or `implicit_surgery` in tx; a batch that the mesh does not divide.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import eupmu_jax as eu
      >>> losses_fn = lambda x, batch: eu.Losses(jnp.mean((x - batch) ** 2), jnp.mean((x + batch) ** 2))
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tx = eu.eupmu(losses_fn, optax.sgd(0.1), eu.Budget(0.1, baseline=1.0))
      >>> step, x, state = eu.training_step(tx, jnp.array(1.0), mesh)  # without mesh: one device
      >>> x, state, info = step(x, state, jnp.array([0.0, 2.0]))
      >>> float(x), float(info.forget_loss)
      (0.800000011920929, 1.0)
    """
    check_transformation(tx, "tx")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {type(mesh).__name__}")
    update: Any = optax.with_extra_args_support(tx).update

    def one_step(params, state, batch, extra_args):
        updates, state = update(None, state, params, batch=batch, **extra_args)
        return optax.apply_updates(params, updates), state, surgery_info(state)

    if mesh is None:
        params, state = owned(params), beside(params, owned(tx.init(params)))
        surgery_state(state)
        compiled = jax.jit(one_step, donate_argnums=(0, 1))
        return lambda params, state, batch, **extra: compiled(params, state, batch, extra), params, state

    with jax.set_mesh(mesh):
        params = owned(jax.tree.map(lambda leaf: place(leaf, mesh), params))
        # Not under jit, which drops the sharding of what is only shaped like params.
        state = owned(jax.tree.map(lambda leaf: place(leaf, mesh), tx.init(params)))
    surgery_state(state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    compiled = jax.jit(one_step, donate_argnums=(0, 1), out_shardings=(*shardings, NamedSharding(mesh, P())))
    specs = P(mesh.axis_names[0]) if batch_spec is None else batch_spec

    def step(params, state, batch, **extra_args):
        with jax.set_mesh(mesh):
            return compiled(params, state, split(batch, specs, mesh), extra_args)

    return step, params, state


def beside(params: PyTree, tree: PyTree) -> PyTree:
    """`tree` on the device that params are committed to.

    A step commits what it returns: the first and the second would be two programs.
    """
    leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return tree
    places = {leaf.sharding for leaf in leaves if leaf.committed}
    is_one_device = len(places) == 1 and isinstance(next(iter(places)), SingleDeviceSharding)
    return jax.device_put(tree, places.pop()) if is_one_device else tree


def owned(tree: PyTree) -> PyTree:
    """A copy: a step takes over what it is given, which must be nobody else's."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def is_on(leaf: PyTree, mesh: Mesh) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and np.array_equal(
        np.asarray(sharding.mesh.devices), np.asarray(mesh.devices)
    )


def place(leaf: PyTree, mesh: Mesh) -> jax.Array:
    """`leaf` as it is sharded on the mesh already, or replicated."""
    return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec if is_on(leaf, mesh) else P()))


def split(batch: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """`batch` on the mesh; of several processes each gives its own rows."""

    def split_leaf(path, leaf, spec):
        if is_on(leaf, mesh):
            return leaf
        spec = spec if np.ndim(leaf) >= len(spec) else P()
        try:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), leaf)
        except ValueError as error:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} of shape {np.shape(leaf)} cannot be split as {spec} on "
                f"{dict(mesh.shape)}: pad it and mask the padding (see Mean), or give batch_spec"
            ) from error

    specs = jax.tree.broadcast(specs, batch, is_leaf=lambda node: isinstance(node, P))
    return jax.tree_util.tree_map_with_path(split_leaf, batch, specs)
