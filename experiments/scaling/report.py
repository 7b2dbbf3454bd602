"""The tables and pictures of the scaling study."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.scaling.compile import CHIPS, Cell, estimated_seconds
from experiments.scaling.hlo import KINDS
from experiments.scaling.models import count_parameters
from experiments.scaling.steps import BUDGET, EXACT, LAGGED, LOOKAHEAD, METHODS, PLAIN, UTILITIES
from experiments.shared.models.llama.config import Config
from experiments.shared.records import RecordsByKey
from experiments.shared.report import Frame, Origin, Picture, Section, save, write_csv
from experiments.shared.report import write_report as write_sections

GIB = 2**30
SHAPE = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "key-value heads": "num_key_value_heads",
    "head width": "head_dim",
    "hidden": "intermediate_size",
    "vocabulary": "vocab_size",
    "tied": "tie_word_embeddings",
}
"""Columns of the table of models, and the fields of a Config that they show."""
COLOURS = dict(zip(METHODS, ("black", "tab:green", "tab:blue", "tab:orange", "tab:red"), strict=True))


def label(cell: Cell) -> str:
    trained = f"{cell.model} LoRA" if cell.lora else cell.model
    texts = f"{1 + UTILITIES} x {cell.sequences} x {cell.time}"
    return f"{trained}, {cell.topology}, {cell.fsdp} x {cell.tensor}, {texts}"


def rows_frame(records: RecordsByKey, cells: list[Cell]) -> Frame:
    """A line for each compiled step, ratios to fine-tuning in the same cell beside it."""
    lines = []
    for cell in cells:
        plain = records.get((*cell, PLAIN))
        for method in METHODS:
            record = records.get((*cell, method))
            if record is None:
                continue
            line: dict[str, Any] = {"cell": label(cell), "chips": cell.chips, "method": method}
            if "error" in record:
                lines.append(line | {"error": record["error"]})
                continue
            line |= {
                name: record[name]
                for name in ("arguments", "temporaries", "outputs", "aliased", "hbm", "peak")
            }
            line |= {name: record[name] for name in ("flops", "bytes", "compile_seconds")}
            line |= {f"{kind} bytes": record["sent"].get(kind, 0.0) for kind in KINDS}
            line |= {f"{kind} calls": record["calls"].get(kind, 0) for kind in KINDS}
            seconds = estimated_seconds(CHIPS[cell.chip], record)
            line |= {f"estimated {name} seconds": value for name, value in seconds.items()}
            line["estimated seconds"] = max(seconds.values())
            line["bound"] = max(seconds, key=lambda name: seconds[name])
            line["fits"] = record["hbm"] <= CHIPS[cell.chip].hbm
            if plain and "error" not in plain:
                line |= {f"{name} ratio": record[name] / plain[name] for name in ("hbm", "flops", "bytes")}
                line["sent ratio"] = sum(record["sent"].values()) / max(1, sum(plain["sent"].values()))
                line["extra per parameter"] = (
                    (record["hbm"] - plain["hbm"]) * cell.chips / plain["parameters"]
                )
            lines.append(line)
    return pd.DataFrame(lines)


def main_table(rows: Frame) -> Frame:
    """HBM, work and estimated time of every step."""
    lines = []
    for _, row in rows.iterrows():
        name = f"{row['cell']}: {row['method']}"
        if "error" in row and isinstance(row["error"], str):
            lines.append({"step": name, "HBM GiB": f"does not compile: {row['error']}"})
            continue
        bytes_of = [row[f"{kind} bytes"] for kind in KINDS]
        lines.append(
            {
                "step": name,
                "HBM GiB": f"{row['hbm'] / GIB:.3f}" + ("" if row["fits"] else " (too much)"),
                "arguments": f"{row['arguments'] / GIB:.3f}",
                "temporaries": f"{row['temporaries'] / GIB:.3f}",
                "HBM / plain": f"{row['hbm ratio']:.3f}",
                "bytes/param. more": f"{row['extra per parameter']:.2f}",
                "TFLOP": f"{row['flops'] / 1e12:.2f}",
                "FLOP / plain": f"{row['flops ratio']:.3f}",
                "HBM traffic GB": f"{row['bytes'] / 1e9:.1f}",
                "sent GB": f"{sum(bytes_of) / 1e9:.2f}",
                "sent / plain": f"{row['sent ratio']:.3f}",
                "est. ms": f"{1e3 * row['estimated seconds']:.1f}",
                "bound by": row["bound"],
            }
        )
    return pd.DataFrame(lines).set_index("step").fillna("-")


def collectives_table(rows: Frame) -> Frame:
    """GB that a chip sends in a step by kind of collective, and how often each runs."""
    lines = {}
    for _, row in rows[rows["hbm"].notna()].iterrows():
        lines[f"{row['cell']}: {row['method']}"] = {
            kind: f"{row[f'{kind} bytes'] / 1e9:.3f} ({row[f'{kind} calls']:.0f})" for kind in KINDS
        }
    return pd.DataFrame(lines).T


def goals_table(rows: Frame) -> Frame:
    """The least and greatest HBM relative to fine-tuning, against what was hoped for."""
    goals = {BUDGET: "<= 1.01", LAGGED: "<= 1.01", LOOKAHEAD: "<= 1.05", EXACT: "-"}
    lines = {}
    for method, goal in goals.items():
        found = rows[(rows["method"] == method) & rows["hbm ratio"].notna()]
        if not len(found):
            continue
        lines[method] = {
            "goal": goal,
            "cells": f"{len(found)}",
            "HBM / plain": f"{found['hbm ratio'].min():.3f} to {found['hbm ratio'].max():.3f}",
            "kept in": f"{(found['hbm ratio'] <= float(goal[3:])).sum()}" if goal != "-" else "-",
            "bytes/param. more": f"{found['extra per parameter'].min():.2f} to "
            f"{found['extra per parameter'].max():.2f}",
            "FLOP / plain": f"{found['flops ratio'].min():.3f} to {found['flops ratio'].max():.3f}",
            "sent / plain": f"{found['sent ratio'].min():.3f} to {found['sent ratio'].max():.3f}",
        }
    return pd.DataFrame(lines).T


def plot(path: pathlib.Path, rows: Frame) -> None:
    """HBM relative to fine-tuning, and the three estimated times, for every cell."""
    rows = rows[rows["hbm"].notna()]
    cells = list(dict.fromkeys(rows["cell"]))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 1.6 + 0.75 * len(cells)), sharey=True, layout="constrained"
    )
    height = 0.8 / len(METHODS)
    for i, method in enumerate(METHODS):
        part = rows[rows["method"] == method]
        y = np.array([cells.index(cell) for cell in part["cell"]]) + (i - (len(METHODS) - 1) / 2) * height
        left.barh(y, part["hbm"] / GIB, height * 0.9, color=COLOURS[method], label=method)
        for place, hbm, ratio in zip(y, part["hbm"] / GIB, part["hbm ratio"], strict=True):
            left.text(hbm, place, f" {ratio:.3f}", va="center", fontsize=8)
        right.barh(y, 1e3 * part["estimated seconds"], height * 0.9, color=COLOURS[method], label=method)
        for place, seconds, bound in zip(y, 1e3 * part["estimated seconds"], part["bound"], strict=True):
            right.text(seconds, place, f" {bound}", va="center", fontsize=8)
    left.set_yticks(range(len(cells)), cells)
    left.invert_yaxis()
    left.set_xlabel("HBM per chip, GiB (written: relative to fine-tuning)")
    right.set_xlabel("roofline estimate of a step, ms (written: what bounds it)")
    for axis in (left, right):
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path, legend=len(METHODS))


def write_report(
    path: pathlib.Path,
    records: RecordsByKey,
    cells: list[Cell],
    models: Mapping[str, Config],
    origin: Origin,
) -> list[Section]:
    """All tables and the picture; returns the sections to show first."""
    rows = rows_frame(records, cells)
    write_csv(path / "rows.csv", rows, origin)
    figures = pd.DataFrame(
        {
            name: {
                "bf16 TFLOP/s": f"{chip.flops / 1e12:.0f}",
                "HBM GB/s": f"{chip.hbm_bandwidth / 1e9:.0f}",
                "HBM GB": f"{chip.hbm / 1e9:.0f}",
                "ICI GB/s": f"{chip.ici_bandwidth / 1e9:.0f}",
            }
            for name, chip in CHIPS.items()
        }
    ).T
    shapes = pd.DataFrame(
        {
            name: {"parameters": f"{count_parameters(config) / 1e9:.3f}e9"}
            | {column: f"{getattr(config, field)}" for column, field in SHAPE.items()}
            for name, config in models.items()
        }
    ).T
    missing = [label(cell) for cell in cells if not any((*cell, method) in records for method in METHODS)]
    how = (
        "Compiled by libtpu for chips that were not there; nothing was run. A cell is a model (LoRA: its "
        "parameters frozen in bfloat16, adapters of rank 8 on queries and values in float32), a topology, "
        "FSDP x tensor parallel, and (texts to forget + texts of each of two sets to retain) x texts of "
        "each kind on an FSDP shard x tokens. HBM per chip is arguments + temporaries + outputs - aliased "
        "(what is trained and the state are donated). FLOPs are those of the matrix products, recomputation "
        "included. HBM traffic (approximate: operands and results of each fusion that lie in HBM) and "
        "collectives are read from the compiled program, loops counted in full. Sent: bytes that leave a "
        "chip in a ring. The time is an estimate: the longest of FLOPs, HBM traffic and sent bytes, each at "
        "the published peak of the chip, as if they overlapped perfectly. All have the same AdamW with "
        "float32 moments after clipping by the global norm. Fine-tuning and EUPMU take all losses from one "
        "pass over all texts, also in the look-ahead; exact surgery takes a pass for what is forgotten and "
        "one for what is retained, and has a gradient for each of the three losses."
    )
    hbm, steps = [how, goals_table(rows)], [main_table(rows)]
    if not rows["hbm"].isna().all():
        plot(path / "hbm.png", rows)
        hbm.append(Picture("hbm.png"))
    if missing:
        steps.append(f"Not compiled yet: {'; '.join(missing)}.")
    sections = [
        Section("HBM against fine-tuning", hbm),
        Section("Steps", steps),
        Section("Collectives", ["GB sent by a chip in a step (runs).", collectives_table(rows)]),
        Section("Chips", [figures]),
        Section("Models", [shapes]),
    ]
    write_sections(path, "Scaling", sections, origin)
    return sections
