"""A run's folder: what made it, its tables, its pictures and one page that shows them all."""

import base64
import dataclasses
import datetime
import html
import importlib.metadata
import io
import json
import pathlib
import platform
import subprocess
from typing import Any

import jax
import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

OTHER_SEED = "Retrain, other seed"
REFERENCES = {
    "Original": {"color": "black", "marker": "X"},
    "Retrain": {"color": "black", "marker": "*"},
    OTHER_SEED: {"color": "grey", "marker": "*"},
}

# A pandas.DataFrame; the types that pandas declares for its cells defeat the type checker.
Frame = Any


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


def start_run(parent: pathlib.Path, name: str, config: Any) -> pathlib.Path:
    """A new folder with config.json: the resolved config, to which every session adds itself."""
    path = new_run_dir(parent, name)
    write_origin(path, {"name": name, "config": plain(dataclasses.asdict(config)), "sessions": []})
    return path


def saved_config(path: pathlib.Path, program: str) -> dict[str, Any]:
    """The config of a run of that program, to resume it; else ValueError."""
    origin = read_origin(path)
    if not origin["name"].startswith(program):
        raise ValueError(f"--resume {path}: this is a run of {origin['name']}, not of {program}")
    return origin["config"]


def note_session(path: pathlib.Path) -> None:
    """Adds what runs now, and on what, to the run's origin if it is not what ran last."""
    origin, now = read_origin(path), session()
    if [one | {"date": None} for one in origin["sessions"][-1:]] != [now | {"date": None}]:
        write_origin(path, origin | {"sessions": [*origin["sessions"], now]})


def write_origin(path: pathlib.Path, origin: dict[str, Any]) -> None:
    partial = path / "config.json.partial"
    partial.write_text(json.dumps(origin, indent=2) + "\n")
    partial.replace(path / "config.json")


def read_origin(path: pathlib.Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        origin = json.loads(file.read_text())
        return {"name": origin["name"], "config": origin["config"], "sessions": list(origin["sessions"])}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not the description of a run: {error}") from error


def session() -> dict[str, Any]:
    """What runs now: versions, device, git commit and date."""
    packages = ["eupmu_jax", "jax", "jaxlib", "optax", "flax", "numpy", "scipy", "scikit-learn"]
    describe = ["git", "describe", "--always", "--dirty"]
    here = pathlib.Path(__file__).parent
    try:
        commit = subprocess.run(describe, cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        commit = "unknown"
    return {
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "commit": commit.strip(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def plain(value: Any) -> Any:
    """`value` in JSON's types; null for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_csv(path: pathlib.Path, frame: Frame, origin: dict[str, Any]) -> None:
    """The frame under a first line "# {...}" with its origin; pandas.read_csv(path, comment="#")."""
    with path.open("w", newline="") as file:
        file.write(f"# {json.dumps(origin)}\n")
        frame.to_csv(file, index=False, float_format="%.6g")


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


class Section(list):
    """A title, and what follows it: text, tables (DataFrame) and names of pictures."""

    def __init__(self, title: str, *parts: Any):
        super().__init__(parts)
        self.title = title


def write_markdown(path: pathlib.Path, title: str, sections: list[Section], origin: dict[str, Any]) -> None:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section:
            if isinstance(part, pd.DataFrame):
                align = ["left"] * part.index.nlevels + ["right"] * part.shape[1]
                lines += [part.to_markdown(colalign=align, disable_numparse=True), ""]
            else:
                lines += [f"![{section.title}]({part})" if part.endswith(".png") else part, ""]
    lines += ["## Origin", "", "```json", json.dumps(origin, indent=1), "```", ""]
    path.write_text("\n".join(lines))


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1em 0}
th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
tbody th{text-align:left;font-weight:normal}tr:hover{background:#f4f4f4}img{max-width:100%}
div{overflow-x:auto}pre{background:#f7f7f7;padding:1em;overflow-x:auto}"""


def write_page(path: pathlib.Path, title: str, sections: list[Section], origin: dict[str, Any]) -> None:
    """One HTML file with every table and picture in it, for reading offline."""

    def shown(part):
        if isinstance(part, pd.DataFrame):
            return f"<div>{part.rename_axis(None).to_html(border=0)}</div>"
        if part.endswith(".png"):
            data = base64.b64encode((path.parent / part).read_bytes()).decode()
            return f'<img alt="{html.escape(part)}" src="data:image/png;base64,{data}">'
        return f"<p>{html.escape(part)}</p>"

    body = "".join(f"<h2>{html.escape(s.title)}</h2>{''.join(map(shown, s))}" for s in sections)
    made_by = (
        f"<details><summary>Origin</summary><pre>{html.escape(json.dumps(origin, indent=1))}</pre></details>"
    )
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}{made_by}</html>\n"
    )


def styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, the same in every picture; EUPMU has the strongest colours."""
    others = sorted((m for m in methods if m not in REFERENCES), key=lambda m: not m.startswith("EUPMU"))
    strong_first = [6, 0, 4, 2, 8, 10, 12, 14, 16, 18, *range(1, 20, 2)]
    colour = lambda i: plt.get_cmap("tab20")(strong_first[i % 20])
    looks = {m: {"color": colour(i), "marker": "DosvP^"[i // 4 % 6]} for i, m in enumerate(others)}
    return {method: REFERENCES.get(method) or looks[method] for method in methods}


def plain_numbers(*axes) -> None:
    """1, 2, 5 in place of powers of ten on logarithmic axes."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def grid(count: int, columns: int, width: float, height: float):
    """A figure, and `count` axes in rows of `columns`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for empty in axes.flat[count:]:
        empty.remove()
    return figure, list(axes.flat[:count])


def save(figure, path: pathlib.Path, legend: int = 0) -> None:
    """Writes the picture, with one legend for all axes in `legend` columns below them."""
    if legend:
        named = {}
        for axis in figure.axes:
            handles, labels = axis.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=legend)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    plt.close(figure)
    # A palette is enough for lines and marks, in a third of the bytes.
    palette = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    palette.save(path, optimize=True)
