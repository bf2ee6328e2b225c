"""Printing on stdout: JSON, tables, and facts as aligned lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.words import clean_text

if TYPE_CHECKING:
    from rich.console import Console


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object; numbers that are not finite become null.

    Escapes stand for what is not ASCII if stdout is not UTF-8.
    """
    import json

    from mlx_randygpt.checkpoint import to_strict_json

    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    ascii_only = encoding.lower().replace("_", "-") not in ("utf-8", "utf8")
    line = json.dumps(to_strict_json(values), ensure_ascii=ascii_only)
    click.echo("".join(c if not "\ud800" <= c <= "\udfff" else f"\\u{ord(c):04x}" for c in line))


def stdout_console() -> Console:
    """Return a console on stdout, as wide as the terminal; in a pipe, wide enough for anything."""
    from rich.console import Console

    at_terminal = sys.stdout.isatty()
    return Console(
        width=None if at_terminal else 1000,
        force_terminal=at_terminal,
        markup=False,
        highlight=False,
        emoji=False,
    )


def show(renderable: Any) -> None:
    """Print a rich renderable; in a pipe, print plain text as wide as it needs to be."""
    console = stdout_console()
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().removesuffix("\n").split("\n"):
        click.echo(line.rstrip())


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print a name and a value per line, aligned, without control characters."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, clean_text(value))
    show(table)
