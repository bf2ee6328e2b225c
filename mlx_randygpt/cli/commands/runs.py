"""`mlxgpt runs`: compare the runs below some folders in one table, the best first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import print_json, show


@click.command("runs", cls=Command)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@json_option
def command(folders: tuple[Path, ...], json: bool) -> None:
    """Compare runs: best and last loss, steps, time, tokens, and settings that differ.

    A FOLDER is a run, or contains runs at any depth; the default is the current folder.
    """
    from mlx_randygpt.analysis.metrics import MetricsError, RunRecord, differing_settings, read_run

    files = sorted({f for folder in folders or (Path(),) for f in folder.rglob("metrics.jsonl")})
    runs: list[tuple[Path, RunRecord]] = []
    for file in files:
        try:
            runs.append((file.parent, read_run(file.parent)))
        except MetricsError as error:
            click.echo(f"Skipped: {error}", err=True)
        except OSError as error:
            click.echo(f"Skipped: {file} cannot be read: {error.strerror}", err=True)
    if not runs:
        searched = ", ".join(map(str, folders)) or "."
        raise MetricsError(f"no run below {searched}; a run is a folder of `mlxgpt train --out`")
    runs.sort(key=lambda run: float(run[1].best.get("val_loss", math.inf)))
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
    """Show one line per run, then the settings that differ, to fit 80 columns."""
    from rich.table import Table
    from rich.text import Text

    from mlx_randygpt.analysis.charts import setting_text
    from mlx_randygpt.words import clean_text, format_clock, format_count

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("best", "at step", "last", "train", "step", "time", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        settings = "  ".join(
            f"{name}={setting_text(value)}" for name, value in row["settings"].items()
        )
        table.add_row(
            Text(clean_text(row["run"]), "bold"),
            _loss(row["best_loss"]),
            f"{row['best_step'] or 0:,}",
            _loss(row["last_loss"]),
            _loss(row["train_loss"]),
            f"{row['step']:,}",
            format_clock(row["seconds"]),
            format_count(row["tokens"]),
        )
        row["line"] = clean_text(settings)
    show(table)
    if any(row["line"] for row in rows):
        show(Text("\nSettings that differ", "bold"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(overflow="fold")
        grid.add_column(overflow="fold")
        for row in rows:
            grid.add_row(Text(clean_text(row["run"]), "bold"), Text(row["line"]))
        show(grid)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
