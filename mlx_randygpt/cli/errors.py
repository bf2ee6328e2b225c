"""The base class of all commands: one-line errors, exit codes, `--debug`, Ctrl-C, `--help`."""

from __future__ import annotations

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


class Command(click.Command):
    """A command that fails with one line and exit code 1; `--debug` shows the traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Add the options that every command has."""
        super().__init__(*args, **kwargs)
        self.params += [config_option(), _debug_option()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections: those of the command first, then the shared ones."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
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
