"""The command line of a study: its options, how a run goes on, and how it ends."""

import argparse
import contextlib
import dataclasses
import inspect
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple, get_args, get_type_hints

import tyro
from rich.console import Console

from experiments.shared.report import saved_config


class Chosen(NamedTuple):
    """What a command line asks for: the study's config, and the folder of the run to go on with, or None."""

    config: Any
    resume: pathlib.Path | None


def run(
    main: Callable[..., Any],
    kind: type,
    configs: Mapping[str, Any] | None = None,
    resumable: bool = True,
) -> None:
    """Runs a study as `python -m experiments.<study>` and ends the process as a command should.

    What goes wrong is one line on stderr and the exit status 1; an interrupt says how to go on and exits
    with 130.

    Args:
      main: (config, folder to resume or None), or (config) for a study that cannot be resumed.
      kind: the dataclass of its options, whose docstrings are the help.
      configs: named sets of options for --config, of which the first is the default.
      resumable: whether it takes --resume.
    """
    module = sys.modules["__main__"].__spec__
    study = main.__module__ if module is None else module.name.removesuffix(".__main__")
    command = f"python -m {study}"
    try:
        chosen = parse(sys.argv[1:], command, kind, configs, resumable)
        main(*chosen if resumable else chosen[:1])
    except ImportError as error:
        sys.exit(f'error: {error}: pip install -e ".[experiments]" brings what the studies need')
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        goes_on = (
            f"go on with {command} --resume {interrupt}" if resumable and interrupt.args else "start again"
        )
        print(f"\nInterrupted: {goes_on}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # What was interrupted still runs in XLA's threads, and an interpreter that is taken down beside them
        # crashes now and then. All files are closed by now.
        os._exit(130)


def parse(
    arguments: list[str],
    command: str,
    kind: type,
    configs: Mapping[str, Any] | None = None,
    resumable: bool = True,
) -> Chosen:
    """The config and the folder to resume; ValueError or OSError for a folder that cannot be."""
    parser = argparse.ArgumentParser(prog=command, add_help=False, allow_abbrev=False)
    if configs:
        parser.add_argument("--config", choices=list(configs))
        parser.add_argument("--smoke", action="store_const", const="smoke", dest="config")
    if resumable:
        parser.add_argument("--resume", type=pathlib.Path)
    known, others = parser.parse_known_args(arguments)
    name, resume = getattr(known, "config", None), getattr(known, "resume", None)
    if resume is None or "--help" in others or "-h" in others:
        default = {"default": configs[name or next(iter(configs))]} if configs else {}
        usage = help_text(kind, configs, resumable)
        return Chosen(tyro.cli(kind, prog=command, description=usage, args=others, **default), None)
    if others or name:
        raise ValueError("--resume takes every setting from its folder: leave the other options out")
    return Chosen(restored(kind, saved_config(resume, command.rpartition(".")[2])), resume)


def help_text(kind: type, configs: Mapping[str, Any] | None, resumable: bool) -> str:
    """The dataclass's docstring, and the options that are not in it."""
    lines = [inspect.getdoc(kind) or ""]
    if resumable:
        lines.append(
            "A run that was interrupted goes on with --resume FOLDER, and takes its settings from there."
        )
    if configs:
        lines.append(
            f"Configurations for --config: {', '.join(configs)}; --smoke is short for --config smoke. Below "
            "are the options of the chosen configuration, any of which can be overridden."
        )
    return "\n\n".join(lines)


def restored(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from its JSON form."""
    hints = get_type_hints(kind)
    if unknown := values.keys() ^ hints.keys():
        raise ValueError(
            f"the run was made by other code, whose settings differ: {', '.join(sorted(unknown))}"
        )

    def field(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return restored(hint, value)
        if isinstance(value, list):
            return tuple(value)
        if isinstance(value, str) and pathlib.Path in (hint, *get_args(hint)):
            return pathlib.Path(value)
        return value

    return kind(**{name: field(hints[name], value) for name, value in values.items()})


def compile_fast() -> None:
    """Before the first use of JAX: a run that is hardly more than compiling takes a third of the time."""
    flags = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):
        # Later versions do not have it, and XLA ends the process for a flag that it does not know.
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)


@contextlib.contextmanager
def working_in(path: pathlib.Path) -> Iterator[Console]:
    """Says where the run is kept, and at its end how long it took; an interrupt carries the folder along."""
    console, start = Console(), time.perf_counter()
    console.print(str(path), soft_wrap=True, highlight=False)
    try:
        yield console
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(path)) from interrupt
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s. All of it: {path / 'report.html'}", soft_wrap=True, highlight=False)
