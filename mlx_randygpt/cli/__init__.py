"""The command line: the only owner of signals, standard output and exit codes.

A command is a module of this package and is imported when it is called; `--help` and `--version`
answer without numpy, mlx or rich.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from mlx_randygpt import __version__
from mlx_randygpt.cli.signals import end_on_ctrl_c

# name -> (module of cli.commands, line for --help)
COMMANDS = {
    "train": ("train", "Train a model on your text; Ctrl-C saves and stops, --resume goes on."),
    "find-lr": ("find_lr", "Find a learning rate in under a minute, with a curve."),
    "sample": ("sample", "Let a trained model write."),
    "chat": ("chat", "Talk with a trained model."),
    "serve": ("serve", "Serve a trained model: the OpenAI API, and a page in the browser."),
    "eval": ("evaluate", "Score a checkpoint on a whole split: loss, perplexity, bits per byte."),
    "info": ("info", "Tell what a checkpoint holds and whether its checksum holds."),
    "data": ("data", "Fetch a corpus by name; make tokens ahead of a run."),
    "import": ("import_", "Read a model of GPT-2, nanoGPT or randyGPT as a checkpoint."),
    "plot": ("plot", "Draw the curves of runs, in the terminal or as a picture."),
    "runs": ("runs", "List and compare runs, the best first."),
    "inspect": ("inspect", "Show what a model has learned, as a page."),
    "export": ("export", "Write a model as files that other programs run."),
    "launch": ("launch", "Train on several ranks or machines: launch -n 4 -- train …"),
    "check": ("check", "Prove the gradients on this machine."),
    "bench": ("bench", "Measure training or sampling speed."),
    "plan": ("plan", "Say what a run needs: memory, time and cost."),
    "presets": ("presets", "List the named sizes with their parameter counts."),
    "doctor": ("doctor", "Look at this machine and say what would make it faster."),
}


class CommandGroup(click.Group):
    """Commands by name, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        module = import_module(f"{__name__}.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}; it is one of {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # while a command was imported
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.command(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlxgpt")
def group() -> None:
    """Train a GPT from scratch on your own text, watch it learn, and let it write.

    Start with `mlxgpt train`; then `mlxgpt sample`.
    """


def main() -> None:
    """The entry point `mlxgpt`."""
    end_on_ctrl_c()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a checkpoint would be opened under its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # no text may end a run
    try:
        group(prog_name="mlxgpt", auto_envvar_prefix="MLXGPT")
    except OSError as error:  # of --help and --version, whose output is click's own
        raise SystemExit(f"Error: the output cannot be written: {error.strerror}") from None
