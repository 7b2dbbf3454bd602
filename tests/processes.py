"""Processes of four devices each on this machine, joined by jax.distributed."""

import os
import pathlib
import socket
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parent.parent


def start(file: str, *arguments: str, count: int = 2) -> list[subprocess.Popen]:
    """`python file index address count arguments` for each index; what they write to stderr is kept."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    settings = {"JAX_ENABLE_X64": "1", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, file, str(index), address, str(count), *arguments],
            env=os.environ | settings,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def join(heartbeat: int = 10) -> tuple[int, list[str]]:
    """Within a started process: its index, and the arguments that it was given."""
    index, address, count, *arguments = sys.argv[1:]
    jax.distributed.initialize(
        address, num_processes=int(count), process_id=int(index), heartbeat_timeout_seconds=heartbeat
    )
    assert len(jax.devices()) == 4 * int(count)
    return int(index), arguments


def wait(processes: list[subprocess.Popen], seconds: float = 200) -> list[str]:
    """What they wrote, when all have ended."""
    try:
        return [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def finish(file: str, *arguments: str, count: int = 2) -> None:
    """Starts them and waits; RuntimeError with what they wrote if one fails."""
    processes = start(file, *arguments, count=count)
    said = wait(processes)
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(said))
