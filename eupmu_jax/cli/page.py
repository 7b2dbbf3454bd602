"""One HTML page that needs no other file: the parts that a report is made of."""

import base64
import html
import pathlib
from collections.abc import Iterable, Mapping

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;display:block;overflow-x:auto;font-variant-numeric:tabular-nums;margin:1em 0}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr:hover{background:#f4f4f4}img{max-width:100%}
pre{background:#f6f6f6;padding:1em;overflow:auto}strong{font-size:1.15em}summary{margin:.5em 0}
@media print{body{max-width:none;margin:0;font-size:10pt}table{display:table;font-size:8pt}
td,th{white-space:normal;padding:.1em .4em}pre{white-space:pre-wrap}
h2{break-after:avoid}tr,img{break-inside:avoid}}"""

Row = Mapping[str, str | float]


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page: its title, then `parts`, which are HTML, each from a function below."""
    name = html.escape(title)
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{name}</h1>{"".join(parts)}</html>\n'


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def emphasised(text: str) -> str:
    return f"<p><strong>{html.escape(text)}</strong></p>"


def listed(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def folded(title: str, part: str) -> str:
    """`part`, which is HTML, behind a title that opens it."""
    return f"<details><summary>{html.escape(title)}</summary>{part}</details>"


def picture(path: pathlib.Path) -> str:
    """The PNG file itself, within the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def table(rows: Iterable[tuple[str, Row]]) -> str:
    """A line for each (label, cells by column), a column for each name that any line has."""
    rows = list(rows)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    shown = lambda value: value if isinstance(value, str) else f"{value:.4g}"
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in ["", *names])]
    for label, row in rows:
        cells = [label, *(shown(row[name]) if name in row else "" for name in names)]
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
