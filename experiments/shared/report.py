"""A run's folder: what made it, its tables, its pictures and one page that shows them all."""

import dataclasses
import datetime
import io
import json
import pathlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd

from eupmu_jax.cli import page
from eupmu_jax.run.files import write_whole
from eupmu_jax.run.provenance import provenance

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

ORIGINAL, RETRAIN, OTHER_SEED = "Original", "Retrain", "Retrain, other seed"

# A pandas.DataFrame; the types that pandas declares for its cells defeat the type checker.
Frame = Any

Origin = dict[str, Any]
"""Where results come from: the study, its settings, and every session that worked on them."""


class Picture(NamedTuple):
    """A PNG file in the run's folder."""

    file: str


class Section(NamedTuple):
    """A title, and what follows it: text, tables and pictures."""

    title: str
    parts: list[str | Frame | Picture]


def tables_of(section: Section) -> list[pd.DataFrame]:
    return [part for part in section.parts if isinstance(part, pd.DataFrame)]


class Look(NamedTuple):
    """How a method is drawn, the same in every picture."""

    color: Any
    marker: str
    stands_out: bool = False

    @property
    def mark(self) -> dict[str, Any]:
        return {"color": self.color, "marker": self.marker}

    @property
    def line(self) -> str:
        return "-" if self.stands_out else "--"


REFERENCES = {
    ORIGINAL: Look("black", "X"),
    RETRAIN: Look("black", "*", stands_out=True),
    OTHER_SEED: Look("grey", "*"),
}


def new_run_dir(parent: pathlib.Path, name: str) -> pathlib.Path:
    """A new folder, named after the time; never one that exists."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        path = parent / f"{name}-{stamp}{f'-{attempt}' if attempt else ''}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"no free name left for {name}-{stamp} in {parent}")


def start_run(parent: pathlib.Path, study: str, config: Any, of: str = "") -> pathlib.Path:
    """A new folder with config.json: the study and the resolved config, to which every session adds itself.

    `of` is added to the folder's name, for people.
    """
    path = new_run_dir(parent, f"{study}-{of}" if of else study)
    write_origin(path, {"name": study, "config": plain(dataclasses.asdict(config)), "sessions": []})
    return path


def saved_config(path: pathlib.Path, study: str) -> dict[str, Any]:
    """The config of a run of that study, to resume it; else ValueError."""
    origin = read_origin(path)
    if origin["name"] != study:
        raise ValueError(f"--resume {path}: this is a run of {origin['name']}, not of {study}")
    return origin["config"]


def note_session(path: pathlib.Path) -> None:
    """Adds what runs now, and on what, to the run's origin if it is not what ran last."""
    of_peers = [package for package in ("torch", "torchjd") if find_spec(package)]
    origin, now = read_origin(path), dict(provenance("scipy", "scikit-learn", *of_peers))
    if [one | {"date": None} for one in origin["sessions"][-1:]] != [now | {"date": None}]:
        write_origin(path, origin | {"sessions": [*origin["sessions"], now]})


def write_origin(path: pathlib.Path, origin: Origin) -> None:
    write_whole(path / "config.json", json.dumps(origin, indent=2) + "\n")


def read_origin(path: pathlib.Path) -> Origin:
    file = path / "config.json"
    try:
        origin = json.loads(file.read_text())
        return {"name": origin["name"], "config": origin["config"], "sessions": list(origin["sessions"])}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not the description of a run: {error}") from error


def plain(value: Any) -> Any:
    """`value` in JSON's types; null for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_csv(path: pathlib.Path, frame: Frame, origin: Origin) -> None:
    """The frame under a first line "# {...}" with its origin; pandas.read_csv(path, comment="#")."""
    write_whole(path, f"# {json.dumps(origin)}\n{frame.to_csv(index=False, float_format='%.6g')}")


def read_csv(path: pathlib.Path) -> Frame:
    return pd.read_csv(path, comment="#")


def mean_and_std(frame: Frame, columns: dict[str, int]) -> Frame:
    """Text "mean ± std" of each column for each method; columns name their decimals.

    The mean over unlearning seeds is one observation of a training seed; "-" where a run has no value.
    """
    by_seed = frame.groupby(["method", "training_seed"], sort=False)[list(columns)]
    observations = by_seed.agg(lambda values: values.mean(skipna=False)).astype(float)
    groups = observations.groupby("method", sort=False)
    means, stds = groups.agg(lambda values: values.mean(skipna=False)), groups.std()

    def cell(method, name):
        mean, std, digits = means.loc[method, name], stds.loc[method, name], columns[name]
        if np.isnan(mean):
            return "-"
        return f"{mean:.{digits}f}" + ("" if np.isnan(std) else f" ± {std:.{digits}f}")

    cells = {name: [cell(method, name) for method in means.index] for name in columns}
    return pd.DataFrame(cells, index=means.index)


def write_report(path: pathlib.Path, title: str, sections: list[Section], origin: Origin) -> None:
    """tables.md, and report.html with every table and picture in it, for reading offline."""
    write_whole(path / "tables.md", as_markdown(title, sections, origin))
    parts = [html for section in sections for html in as_html(path, section)]
    made_by = page.folded("Origin", page.preformatted(json.dumps(origin, indent=1)))
    write_whole(path / "report.html", page.page(title, [*parts, made_by]))


def as_markdown(title: str, sections: list[Section], origin: Origin) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            match part:
                case Picture(file):
                    lines += [f"![{section.title}]({file})", ""]
                case str():
                    lines += [part, ""]
                case frame:
                    align = ["left"] * frame.index.nlevels + ["right"] * frame.shape[1]
                    lines += [frame.to_markdown(colalign=align, disable_numparse=True), ""]
    return "\n".join([*lines, "## Origin", "", "```json", json.dumps(origin, indent=1), "```", ""])


def as_html(path: pathlib.Path, section: Section) -> list[str]:
    """The section's parts for `page`; pictures are read from the run's folder."""
    parts = [page.heading(section.title)]
    for part in section.parts:
        match part:
            case Picture(file):
                parts.append(page.picture(path / file))
            case str():
                parts.append(page.paragraph(part))
            case frame:
                rows = [
                    (str(label), {str(k): cell for k, cell in row.items()}) for label, row in frame.iterrows()
                ]
                parts.append(page.table(rows))
    return parts


def looks_of(families: Mapping[str, str]) -> dict[str, Look]:
    """The look of each method by its family; EUPMU has the strongest colours, references have their own."""
    others = [method for method in families if method not in REFERENCES]
    others.sort(key=lambda method: families[method] != "EUPMU")
    strong_first = [6, 0, 4, 2, 8, 10, 12, 14, 16, 18, *range(1, 20, 2)]
    colour = lambda i: plt.get_cmap("tab20")(strong_first[i % 20])
    looks = {
        method: Look(colour(i), "DosvP^"[i // 4 % 6], families[method] == "EUPMU")
        for i, method in enumerate(others)
    }
    return {method: REFERENCES.get(method) or looks[method] for method in families}


def plain_numbers(*axes: Axis) -> None:
    """1, 2, 5 in place of powers of ten on logarithmic axes."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure, and `count` axes in rows of `columns`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for empty in axes.flat[count:]:
        empty.remove()
    return figure, list(axes.flat[:count])


def save(figure: Figure, path: pathlib.Path, legend: int = 0) -> None:
    """Writes the picture; one legend for all axes lies below, in `legend` columns or as many as fit."""
    if legend:
        named = {}
        for axis in figure.axes:
            handles, labels = axis.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        # A name is a line and 15 to 25 letters wide, which is about two inches.
        columns = max(1, min(legend, int(figure.get_figwidth() / 2)))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    plt.close(figure)
    # A palette is enough for lines and marks, in a third of the bytes.
    palette = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    palette.save(path, optimize=True)
