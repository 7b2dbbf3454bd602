"""What a study shows while it runs and when it is done."""

import contextlib
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.shared.report import Section


@contextlib.contextmanager
def progress_bar(console: Console, total: float):
    """progress(what, part): a bar, or a line now and then where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = console.is_terminal
    last = 0.0
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=total)

        def progress(what: str, part: float) -> None:
            nonlocal last
            bar.update(task, description=escape(what), advance=part)
            if not shown and time.monotonic() - last > 30:
                last = time.monotonic()
                console.print(f"{bar.tasks[0].percentage:3.0f}% {escape(what)}", highlight=False)

        yield progress


def show(console: Console, sections: list[Section]) -> None:
    """The main tables in the terminal."""
    for section in sections:
        frame, *texts = section
        names = [name for name in ("UA", "RA", "TA", "MIA", "gap", "seconds") if name in frame.columns]
        out = Table(title=section.title, title_justify="left")
        out.add_column("method", no_wrap=True)
        for name in names:
            out.add_column(name, justify="right")
        for method, cells in frame[names].iterrows():
            out.add_row(escape(str(method)), *cells)
        console.print(out)
        for text in texts:
            console.print(text, highlight=False, end="\n\n")
