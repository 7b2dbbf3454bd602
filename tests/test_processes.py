"""Two processes of four devices each, joined by jax.distributed, give the one-process answer."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_layouts import KINDS, axis_of, make_step, on_layout, on_one_device, placed, problem, run

LAYOUTS = ["jit", "jit, FSDP", "shard_map"]
CASES = [(layout, kind, utilities) for layout in LAYOUTS for kind in KINDS for utilities in (1, 3)]


def work(index: int, port: str, path: str) -> None:
    """What each process does; the first one writes all ends."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    assert len(jax.devices()) == 2 * len(jax.local_devices()) == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicate = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    ends = {}
    for number, (layout, kind, utilities) in enumerate(CASES):
        losses_fn, params, batch = problem(utilities)
        step, init = make_step(kind, losses_fn, utilities, axis_of(layout))
        end = replicate(run(on_layout(layout, step), init, placed(layout, params), batch))
        for i, leaf in enumerate(jax.tree.leaves(end)):
            ends[f"{number} {i}"] = np.asarray(leaf.addressable_data(0))
    if index == 0:
        np.savez(path, **ends)


def test_two_processes_give_the_same_answer(tmp_path, x64):
    path = tmp_path / "ends.npz"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    settings = {"JAX_ENABLE_X64": "1", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(index), port, str(path)],
            env=os.environ | settings,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    expected = {case: on_one_device(*case[1:]) for case in CASES}
    errors = [process.communicate(timeout=500)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    ends = np.load(path)
    for number, case in enumerate(CASES):
        for i, one in enumerate(jax.tree.leaves(expected[case])):
            np.testing.assert_allclose(ends[f"{number} {i}"], one, rtol=1e-12, atol=1e-12, err_msg=str(case))


if __name__ == "__main__":
    work(int(sys.argv[1]), *sys.argv[2:])
