"""A long run of a small problem: does memory stay flat, is anything compiled again, does it slow down?"""

import dataclasses
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import eupmu_jax as eu
from experiments.shared import command
from experiments.shared.report import (
    Frame,
    Picture,
    Section,
    grid,
    note_session,
    read_origin,
    save,
    start_run,
    write_csv,
    write_report,
)

PARTS = 40


@dataclasses.dataclass(frozen=True)
class Config:
    """Run `unlearn` for very many steps, with checkpoints, and watch the process.

    An MLP of 2,410 weights on random images and labels, under a budget; 200,000 steps take some minutes.
    Writes tables.md, rows.csv, a picture and report.html to a new folder under --runs-dir.
    """

    steps: int = 200_000
    """How many steps, in 40 parts of equal length."""

    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where the run's folder is made."""


def resident_mebibytes() -> float:
    """Memory of this process now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch(config: Config, path: pathlib.Path) -> Frame:
    """One row for each part of the run: steps per second, memory, how often losses_fn was traced so far."""
    rng = np.random.default_rng(0)
    data = lambda amount: {
        "x": rng.normal(size=(amount, 64)).astype(np.float32),
        "y": rng.integers(0, 10, amount),
    }
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
    params = {"a": normal(64, 32), "b": jnp.zeros(32), "c": normal(32, 10), "d": jnp.zeros(10)}
    traces = 0

    def losses_fn(params, batch):
        nonlocal traces
        traces += 1

        def loss(rows):
            logits = jax.nn.relu(rows["x"] @ params["a"] + params["b"]) @ params["c"] + params["d"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows["y"]).mean()

        return eu.Losses(-loss(batch["forget"]), loss(batch["retain"]))

    rows, last = [], time.perf_counter()

    def look(params, metrics):
        nonlocal last
        now, step = time.perf_counter(), metrics["step"]
        if step:
            rate = (step - rows[-1]["step"] if rows else step) / (now - last)
            rows.append(
                {"step": step, "steps per second": rate, "MiB": resident_mebibytes(), "traces": traces}
                | {name: metrics[name] for name in ("retain_loss", "skipped_steps")}
            )
        last = now

    sets = data(200), data(2000)
    eu.unlearn(
        losses_fn,
        params,
        *sets,
        optax.sgd(0.01),
        eu.Budget(0.1),
        steps=config.steps,
        every=max(1, config.steps // PARTS),
        batch_size=32,
        callbacks=[look],
        folder=path / "unlearn",
    )
    return pd.DataFrame(rows)


def plot(path: pathlib.Path, rows: Frame) -> None:
    figure, (speed, memory) = grid(2, 2, 6, 3)
    speed.plot(rows["step"], rows["steps per second"], ".-")
    speed.set(xlabel="step", ylabel="steps per second", ylim=(0, None))
    memory.plot(rows["step"], rows["MiB"], ".-")
    memory.set(xlabel="step", ylabel="memory of the process, MiB", ylim=(0, 1.15 * rows["MiB"].max()))
    save(figure, path)


def table(rows: Frame) -> Frame:
    """The second quarter of the run beside the last."""
    quarter = max(1, len(rows) // 4)
    parts = {"second quarter": rows[quarter : 2 * quarter], "last quarter": rows[-quarter:]}
    return pd.DataFrame(
        {
            "steps per second, median": [
                f"{part['steps per second'].median():.0f}" for part in parts.values()
            ],
            "MiB, mean": [f"{part['MiB'].mean():.1f}" for part in parts.values()],
            "traces of losses_fn so far": [f"{part['traces'].max()}" for part in parts.values()],
        },
        index=list(parts),
    )


def main(config: Config) -> pathlib.Path:
    path = start_run(config.runs_dir, "soak", config)
    with command.working_in(path) as console:
        note_session(path)
        rows = watch(config, path)
        origin, quarters = read_origin(path), table(rows)
        write_csv(path / "rows.csv", rows, origin)
        plot(path / "soak.png", rows)
        sections = [Section(f"{config.steps:,} steps", [quarters, Picture("soak.png")])]
        write_report(path, "Soak", sections, origin)
        console.print(quarters.to_string())
    return path


if __name__ == "__main__":
    # One process is watched from its start to its end: there is nothing to go on from.
    command.run(main, Config, resumable=False)
