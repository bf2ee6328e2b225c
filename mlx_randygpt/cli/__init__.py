"""The command line: the only part that owns signals, standard output and exit codes.

Each command is a module of `cli.commands` and is imported when it is called, so that `--help` and
`--version` run without numpy, mlx or rich.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

from mlx_randygpt import __version__
from mlx_randygpt.cli.errors import Group
from mlx_randygpt.cli.output import echo
from mlx_randygpt.words import clean_text

# section of --help -> name -> (module of cli.commands, line for --help)
SECTIONS = {
    "Training": {
        "train": ("train", "Train a model on your text, or resume a run with --resume."),
        "runs": ("runs", "List and compare runs, the best first."),
        "plot": ("plot", "Plot the curves of runs, in the terminal or as a picture."),
        "find-lr": ("find_lr", "Find a learning rate in under a minute."),
        "launch": ("launch", "Train on several ranks or machines: launch -n 4 -- train …"),
    },
    "Using a model": {
        "sample": ("sample", "Generate text with a trained model."),
        "chat": ("chat", "Chat with a trained model."),
        "serve": ("serve", "Serve a trained model: an OpenAI-compatible API and a web page."),
        "eval": ("evaluate", "Evaluate a model on a whole text: loss, perplexity, bits/byte."),
        "inspect": ("inspect", "Show what a model has learned, as a web page."),
        "info": ("info", "Show what a checkpoint holds and verify its checksum."),
    },
    "Texts and models": {
        "data": ("data", "Download a corpus by name; check or tokenize a text before a run."),
        "import": ("import_", "Import a model of GPT-2, nanoGPT or randyGPT."),
        "export": ("export", "Export a model for other programs."),
        "presets": ("presets", "List the presets with their sizes and parameter counts."),
    },
    "This machine": {
        "plan": ("plan", "Estimate memory, time and cost of a run."),
        "bench": ("bench", "Measure training or sampling speed."),
        "check": ("check", "Check the gradients on this machine."),
        "doctor": ("doctor", "Examine this machine and suggest what would make it faster."),
    },
}
COMMANDS = {name: row for commands in SECTIONS.values() for name, row in commands.items()}


class CommandGroup(Group):
    """The group of all commands, each imported on use."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line, and strip control characters from its error messages."""
        with _clean_errors():
            return super().make_context(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of `--help`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None if there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        module = import_module(f"{__name__}.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit with code 130 if Ctrl-C comes while it is being imported."""
        try:
            with _clean_errors():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            echo("\nInterrupted.", err=True)
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        width = max(map(len, COMMANDS))  # one column for all sections
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{n:{width}}", line) for n, (_, line) in commands.items()])


@contextlib.contextmanager
def _clean_errors() -> Iterator[None]:
    """Replace control characters in the message of an error, which can quote user input."""
    try:
        yield
    except click.ClickException as error:
        error.message = clean_text(error.message, keep="\n")  # type: ignore[misc]
        raise


@click.command(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlxgpt")
def group() -> None:
    """Train a GPT from scratch on your own text, watch it learn, and generate text with it.

    Start with `mlxgpt train`, then `mlxgpt sample`. `mlxgpt COMMAND --help` explains a command.
    """


def _leave_threads(code: object) -> None:
    """After a signal, end the process at once if a thread is left that nothing can stop.

    Learning a vocabulary is such a thread. Python's own end would take it away inside a library,
    which then aborts the process. Whatever is to be saved is saved before the exit code is known.
    """
    is_left = any(thread.daemon for thread in threading.enumerate())
    if is_left and isinstance(code, int) and code > 128:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def main() -> None:
    """Run the program `mlxgpt`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a checkpoint would get its file number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # no character must end a run
    try:
        group(prog_name="mlxgpt", auto_envvar_prefix="MLXGPT")
    except SystemExit as end:
        _leave_threads(end.code)
        raise
    except OSError as error:  # from --help and --version, which click prints
        raise SystemExit(f"Error: the output cannot be written: {error.strerror}") from None
