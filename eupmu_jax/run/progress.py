"""A live bar on a terminal, nothing elsewhere."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

SHOWN = ("forget_loss", "retain_loss", "violation", "multiplier")


@contextlib.contextmanager
def live_bar(total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr, where that is a terminal; of several processes the first one shows it.

    Args:
      total: what the bar counts up to.

    Yields:
      show(done, text): how much of it is done, and what stands beside the bar.
    """
    if not sys.stderr.isatty() or jax.process_index() > 0:
        yield lambda done, text: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.fields[text]}")
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), text)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, text="")
        yield lambda done, text: bar.update(task, completed=done, text=escape(text))


def say_where_it_goes_on(folder: os.PathLike, done: int, steps: int, stopped: str | None) -> None:
    """On stderr, for a folder that holds steps already: how many, and whether any are left."""
    where = f"goes on after step {done} of {steps}" if done < steps else f"has done all {steps} steps"
    if stopped:
        where = f"stopped at step {done}: {stopped}"
    print(f"the run in {folder} {where}", file=sys.stderr)


@contextlib.contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[int, Mapping[str, np.ndarray]], None]]:
    """The bar of an unlearning run.

    Args:
      steps: how many there are.

    Yields:
      show(done, seen): how many are done, and for each of `SHOWN` its values so far, of which the last
      is shown: of several utilities the highest.
    """
    if not sys.stderr.isatty():
        # Nothing is written, and so nothing put into words, step by step.
        yield lambda done, seen: None
        return
    with live_bar(steps) as show:
        of_step = lambda seen, step: "  ".join(f"{name} {np.max(seen[name][step]):.4g}" for name in SHOWN)
        yield lambda done, seen: show(done, f"{done} of {steps}  {of_step(seen, done - 1)}")
