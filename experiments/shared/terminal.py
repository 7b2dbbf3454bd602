"""What a study shows while it runs and when it is done."""

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eupmu_jax.run.progress import live_bar
from experiments.shared.report import Section, tables_of
from experiments.shared.testbed import Progress

SECONDS_BETWEEN_LINES = 30


@contextlib.contextmanager
def progress_bar(console: Console, total: float) -> Iterator[Progress]:
    """progress(what, part): a bar, or a line now and then where there is no terminal."""
    done, last = 0.0, 0.0
    with live_bar(total) as show:

        def progress(what: str, part: float) -> None:
            nonlocal done, last
            done += part
            show(done, what)
            if not sys.stderr.isatty() and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                console.print(f"{100 * done / total:3.0f}% {what}", highlight=False, markup=False)

        yield progress


def show(console: Console, sections: list[Section]) -> None:
    """The main tables in the terminal, each the first of its section."""
    for section in sections:
        frame = tables_of(section)[0]
        names = [name for name in ("UA", "RA", "TA", "MIA", "gap", "seconds") if name in frame.columns]
        out = Table(title=section.title, title_justify="left")
        out.add_column("method", no_wrap=True)
        for name in names:
            out.add_column(name, justify="right")
        for method, cells in frame[names].iterrows():
            out.add_row(escape(str(method)), *cells)
        console.print(out)
        for text in filter(lambda part: isinstance(part, str), section.parts):
            console.print(text, highlight=False, end="\n\n")
