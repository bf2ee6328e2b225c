"""The base classes of all commands: one-line errors, exit codes, `--debug`, Ctrl-C, `--help`."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from typing import Any

import click

from mlx_randygpt.cli.config_file import config_option
from mlx_randygpt.cli.device_errors import describe_failure
from mlx_randygpt.cli.output import echo
from mlx_randygpt.cli.signals import raise_on_ctrl_c
from mlx_randygpt.config import UserError
from mlx_randygpt.words import clean_text, one_line

_DEBUG = "mlx_randygpt.debug"
FIRST, LAST = "Options", "For every command"  # sections of --help
PLACEHOLDERS = {  # of values: click's names for types, and those of the docs
    "INTEGER RANGE": "N",
    "FLOAT RANGE": "X",
    "INTEGER": "N",
    "FLOAT": "X",
    "FILE": "PATH",
}


class Group(click.Group):
    """A group of commands that suggests a name for an unknown one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Fail with the nearest commands if the name is unknown, or with all if none is near."""
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            near = get_close_matches(args[0], names)
            known = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(names)}"
            ctx.fail(f"No such command {args[0]!r}; {known}")
        return super().resolve_command(ctx, args)


class Command(click.Command):
    """A command that fails with one line and exit code 1; `--debug` shows the traceback."""

    def __init__(self, *args: Any, first: Iterable[str] = (), **kwargs: Any) -> None:
        """Add the options that every command has; those named in `first` open the help."""
        super().__init__(*args, **kwargs)
        self.first = tuple(first)
        self.params += [config_option(), _debug_option()]

    def sections(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """Return the options and their help by section, those of every command last."""
        sections: dict[str, list[tuple[str, str]]] = {FIRST: []}
        params = {param.name: param for param in self.get_params(ctx)}
        places = dict.fromkeys(self.first, FIRST) | {"config": LAST, "debug": LAST}
        for name in dict.fromkeys((*self.first, *params)):
            record = params[name].get_help_record(ctx)
            if record is None or isinstance(params[name], click.Argument):
                continue
            own = LAST if "--help" in params[name].opts else getattr(params[name], "section", FIRST)
            title = places.get(str(name), own)
            sections.setdefault(title, []).append((_short(record[0]), record[1]))
        sections[LAST] = sections.pop(LAST)
        return {title: records for title, records in sections.items() if records}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in their sections."""
        for title, records in self.sections(ctx).items():
            with formatter.section(title):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn any exception into an exit code and one line."""
        try:
            with raise_on_ctrl_c():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise click.ClickException(describe_error(error)) from error


def _short(spec: str) -> str:
    """Return `--iters N` for `--iters INTEGER`, and so on."""
    for long, short in PLACEHOLDERS.items():
        spec = spec.replace(long, short)
    return spec


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=lambda ctx, _, value: ctx.meta.update({_DEBUG: value}),
        help="Show the traceback of an error.",
    )


def describe_error(error: Exception) -> str:
    """Return the line that follows `Error: `."""
    if isinstance(error, UserError):
        return clean_text(str(error))
    if failure := describe_failure(error):
        return failure
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG, EIO):
        return f"the output cannot be written: {error.strerror}"
    return f"unexpected {type(error).__name__}: {one_line(error)} (--debug shows where)"
