"""The metrics of a run for TensorBoard."""

import os
from collections.abc import Callable

import jax
import numpy as np

from eupmu_jax.method.types import PyTree


def tensorboard(folder: str | os.PathLike) -> Callable[[PyTree, dict], None]:
    """A callback that writes the metrics of every evaluation for TensorBoard.

    Of several processes the first one writes.

    Args:
      folder: where the event files go: ``tensorboard --logdir FOLDER``.

    Returns:
      (params, metrics) -> None, for the ``callbacks`` of `unlearn`.

    Raises:
      ImportError: tensorboardX is missing.

    Example:
      >>> import eupmu_jax as eu, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     eu.tensorboard(folder)(None, {"step": 10, "retain_loss": 0.5})
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError('tensorboard needs tensorboardX: pip install -e ".[tensorboard]"') from error

    if jax.process_index() > 0:
        return lambda params, metrics: None
    writer = SummaryWriter(os.fspath(folder))

    def write(params: PyTree, metrics: dict) -> None:
        del params
        for name, value in metrics.items():
            for k, number in enumerate(np.ravel(value)):
                writer.add_scalar(
                    name if np.ndim(value) == 0 else f"{name}/{k}", float(number), metrics["step"]
                )
        writer.flush()

    return write
