"""Printing on stdout: JSON, tables, and facts as aligned lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object; numbers that are not finite become null."""
    import json

    from mlx_randygpt.checkpoint import to_strict_json

    click.echo(json.dumps(to_strict_json(values), ensure_ascii=False))


def show(renderable: Any) -> None:
    """Print a rich renderable; in a pipe, print plain text as wide as it needs to be."""
    from rich.console import Console

    at_terminal = sys.stdout.isatty()
    console = Console(
        width=None if at_terminal else 1000,
        force_terminal=at_terminal,
        markup=False,
        highlight=False,
        emoji=False,
    )
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().removesuffix("\n").split("\n"):
        click.echo(line.rstrip())


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print a name and a value per line, aligned, without control characters."""
    from rich.table import Table

    from mlx_randygpt.screen.words import clean

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, clean(value))
    show(table)


def readable_bytes(n_bytes: int) -> str:
    """Return `202.1 kB`, `14.5 MB`, `23.6 GB`."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, scale = next((u for u in units if n_bytes >= u[1]), units[-1])
    return f"{n_bytes / scale:,.1f} {unit}"
