"""The base class of all commands: errors as one line, exit codes, `--debug` and Ctrl-C."""

from __future__ import annotations

from errno import EDQUOT, EFBIG, EIO, ENOSPC
from typing import Any

import click

from mlx_randygpt.cli.config_file import _config_option
from mlx_randygpt.cli.signals import raise_on_ctrl_c
from mlx_randygpt.config import UserError

_DEBUG = "mlx_randygpt.debug"
NO_MEMORY = (  # MLX says so in a RuntimeError: its allocator, Metal's command buffers, CUDA
    "unable to allocate", "maximum allowed buffer size", "insufficient memory", "out of memory",
)  # fmt: skip


class Command(click.Command):
    """A command whose failures are one line on stderr and exit code 1, tracebacks on `--debug`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [_config_option(), _debug_option()]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with raise_on_ctrl_c():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise click.ClickException(_one_line(error)) from error


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=lambda ctx, _, value: ctx.meta.update({_DEBUG: value}),
        help="Show the traceback of an error.",
    )


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(said in text.lower() for said in NO_MEMORY):
        return f"out of memory ({text}); try a smaller --batch-size, --block-size or model"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG, EIO):
        return f"the output cannot be written: {error.strerror}"
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"
