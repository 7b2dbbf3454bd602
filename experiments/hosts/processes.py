"""Several processes: those of a SLURM job, of a TPU pod, or two on this machine.

srun python -m experiments.hosts.processes cluster      on every node; on a TPU pod the same without srun
python -m experiments.hosts.processes                   two processes of two CPU devices each, started here
"""

import os
import socket
import subprocess
import sys

import jax
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import eupmu_jax as eu
from experiments.hosts import task
from experiments.hosts.optax_alone import fit, initial, of


def losses_fn(params, batch):
    return task.losses(of(params), batch)


def unlearn() -> eu.History:
    """What every process does, each with its own rows."""
    index, count = jax.process_index(), jax.process_count()
    own = {name: {key: rows[index::count] for key, rows in part.items()} for name, part in task.SETS.items()}

    knowing = lambda params, batch: task.knowing(of(params), batch)
    params = fit(knowing, optax.adam(3e-3), initial(), 400)
    # All must start from the same numbers: from one checkpoint, or from what process 0 has.
    params = multihost_utils.broadcast_one_to_all(params)
    before = task.retain_loss(of(params))

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    params, history = eu.unlearn(
        losses_fn, params, own["forget"], own["retain"], optax.adam(1e-3), eu.Budget(task.TOTAL),
        steps=400, batch_size=64, mesh=mesh,
    )  # fmt: skip
    params = jax.device_get(params)
    if index == 0:
        print(f"{count} processes, {jax.device_count()} devices.")
        task.report(of(params), before)
        print(eu.verdict(history.promise))
    return history


def start_two() -> None:
    """Two processes here, which are told what those of a cluster find out."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.hosts.processes", address, "2", index],
            env=os.environ | devices,
        )
        for index in "01"
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit("a process failed")


def join(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """One of the processes. Of a SLURM job or a TPU pod JAX finds out where they are."""
    # A process that dies ends the others after so many seconds.
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=30)
    unlearn()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            start_two()
        case [address, count, index]:
            join(address, int(count), int(index))
        case _:
            join()
