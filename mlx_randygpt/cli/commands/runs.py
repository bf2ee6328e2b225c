"""`mlxgpt runs`: compare the runs below some folders in one table, the best first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import echo, print_json, show, stdout_console
from mlx_randygpt.cli.values import FilePath

GAP = 2  # columns between two columns
MAX_NAME = 24  # columns of a name before a number has to make way for it
DROPPED_FIRST = ("tokens", "time", "train", "last", "at step", "step")  # on a narrow terminal


@click.command("runs", cls=Command)
@click.argument("folders", nargs=-1, type=FilePath(path_type=Path))
@json_option
def command(folders: tuple[Path, ...], json: bool) -> None:
    """Compare runs: best and last loss, steps, time, tokens, and settings that differ.

    A FOLDER is a run, or contains runs at any depth; the default is the current folder.
    """
    from mlx_randygpt.analysis.metrics import differing_settings, runs_below

    found = runs_below(folders or (Path(),), lambda reason: echo(f"Skipped: {reason}", err=True))
    runs = sorted(found.items(), key=lambda run: float(run[1].best.get("val_loss", math.inf)))
    settings = differing_settings([record for _, record in runs])
    rows = [
        {**facts(path, record), "settings": {name: values[i] for name, values in settings.items()}}
        for i, (path, record) in enumerate(runs)
    ]
    if json:
        print_json({"runs": rows})
        return
    _table(rows)


def facts(path: Path, record: Any) -> dict[str, Any]:
    """Return the row of a run, without its settings."""
    evaluations = record.evaluations
    return {
        "run": str(path),
        "best_loss": record.best.get("val_loss"),
        "best_step": record.best.get("step"),
        "last_loss": evaluations[-1]["val_loss"] if evaluations else None,
        "train_loss": record.last.get("loss"),
        "step": record.last.get("step", 0),
        "seconds": record.last.get("seconds") or 0.0,
        "tokens": record.last.get("tokens") or 0,
    }


def _table(rows: list[dict[str, Any]]) -> None:
    """Show one line per run, then the settings that differ."""
    from rich.table import Table
    from rich.text import Text

    from mlx_randygpt.analysis.charts import setting_text
    from mlx_randygpt.words import clean_text

    cells = [_cells(row) for row in rows]
    shown = fitting_columns(cells, stdout_console().width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    table.add_column("run", overflow="fold")
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in cells:
        table.add_row(Text(row["run"], "bold"), *(row[name] for name in shown))
    show(table)
    grid = Table.grid(padding=(0, GAP, 0, 0))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for run, row in zip(rows, cells, strict=True):
        settings = (f"{name}={setting_text(value)}" for name, value in run["settings"].items())
        grid.add_row(Text(row["run"], "bold"), clean_text("  ".join(settings)))
    if any(row["settings"] for row in rows):
        show(Text("\nSettings that differ", "bold"))
        show(grid)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    from mlx_randygpt.words import clean_text, format_clock, format_count

    return {
        "run": clean_text(row["run"]),
        "best": _loss(row["best_loss"]),
        "at step": f"{row['best_step'] or 0:,}",
        "last": _loss(row["last_loss"]),
        "train": _loss(row["train_loss"]),
        "step": f"{row['step']:,}",
        "time": format_clock(row["seconds"]),
        "tokens": format_count(row["tokens"]),
    }


def fitting_columns(cells: list[dict[str, str]], width: int) -> list[str]:
    """Return the columns that fit beside the names of the runs, in their order.

    A name longer than MAX_NAME is folded if that saves a column. The lowest loss always stays.
    """
    from rich.cells import cell_len

    sizes = {name: max(cell_len(row[name]) for row in cells) for name in cells[0]}
    sizes = {name: max(size, len(name)) + GAP for name, size in sizes.items()}
    free = width - min(sizes.pop("run"), MAX_NAME + GAP)
    for name in DROPPED_FIRST:
        if sum(sizes.values()) > free:
            del sizes[name]
    return list(sizes)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
