"""The one place that prints: text, notices, JSON, tables, and facts as aligned lines.

What a terminal could act on never reaches it: names, paths and the text of a model may hold any
character. The live screen and the plain lines of a run clean their text themselves.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.words import clean_text, replace_surrogates, wrap_words

if TYPE_CHECKING:
    from rich.console import Console


def echo(text: str = "", *, err: bool = False, nl: bool = True, wrapped: bool = False) -> None:
    """Print text; on a terminal, replace control characters. Files and pipes get all of it.

    Lone surrogates, which no encoding can hold, are replaced everywhere. With `wrapped`, lines on a
    terminal end between words: for sentences, not for commands, which are copied from there.
    """
    text = replace_surrogates(text)
    if is_terminal(sys.stderr if err else sys.stdout):
        text = clean_text(text, keep="\n\t")
        text = "\n".join(wrap(text)) if wrapped else text
    click.echo(text, err=err, nl=nl, color=True)  # without color=True a pipe would get less


def ring_bell() -> None:
    """Ring the bell of the terminal on stderr, if there is one."""
    if is_terminal(sys.stderr):
        click.echo("\a", err=True, nl=False)


def echo_notice(text: str, *, is_error: bool = False) -> None:
    """Print a remark or an error on stderr; on a terminal its style keeps it apart from answers."""
    if not is_terminal(sys.stderr):
        echo(text, err=True)
        return
    lines = wrap(clean_text(text, keep="\n\t"), indent=0 if is_error else 2)
    shown = "\n".join(lines)
    style: dict[str, Any] = {"fg": "red"} if is_error else {"dim": True}
    click.echo(styled(shown if is_error else "·" + shown[1:], **style), err=True, color=True)


def wrap(text: str, indent: int = 0) -> list[str]:
    """Return the lines of a text, broken between words to fit the terminal, and indented."""
    width = max(1, shutil.get_terminal_size().columns - indent)
    lines = [part for line in text.split("\n") for part in wrap_words(line, width)]
    return [" " * indent + line for line in lines]


def styled(text: str, **style: Any) -> str:
    """Return a text in a style of `click.style`, or as it is if colours are not wanted."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else click.style(text, **style)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal."""
    return bool(stream.isatty())


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object; numbers that are not finite become null.

    Escapes stand for what is not printable, and for what is not ASCII if stdout is not UTF-8.
    """
    import json

    from mlx_randygpt.checkpoint import to_strict_json

    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    ascii_only = encoding.lower().replace("_", "-") not in ("utf-8", "utf8")
    line = json.dumps(to_strict_json(values), ensure_ascii=ascii_only)
    echo("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line))


def stdout_console() -> Console:
    """Return a console on stdout, as wide as the terminal; in a pipe, wide enough for anything."""
    from rich.console import Console

    at_terminal = is_terminal(sys.stdout)
    return Console(
        width=None if at_terminal else 1000,
        force_terminal=at_terminal,
        markup=False,
        highlight=False,
        emoji=False,
    )


def show(renderable: Any, console: Console | None = None, **options: Any) -> None:
    """Print a rich renderable; in a pipe, print plain text as wide as it needs to be.

    `options` are those of Console.print.
    """
    console = console or stdout_console()
    with console.capture() as captured:
        console.print(_Cleaned(renderable), **options)
    for line in captured.get().removesuffix("\n").split("\n"):
        click.echo(line.rstrip(), err=console.stderr, color=True)


class _Cleaned:
    """A renderable without control characters, besides those that rich adds for its styles."""

    def __init__(self, renderable: Any) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: Any) -> Iterator[Any]:
        for segment in console.render(self._renderable, options):
            yield segment._replace(text=clean_text(segment.text, keep="\n"))


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print a name and a value per line, aligned, without control characters."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, clean_text(value))
    show(table)
