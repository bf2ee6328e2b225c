"""`mlxgpt chat`: a conversation in the terminal, or with a script through a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import Loaded, load, parse_biases
from mlx_randygpt.cli.options import (
    backend_option,
    checkpoint_option,
    quantize_option,
    sampling_options,
)
from mlx_randygpt.cli.output import echo
from mlx_randygpt.cli.signals import CtrlC
from mlx_randygpt.cli.values import FilePath

if TYPE_CHECKING:
    from mlx_randygpt.sampling.chat import Conversation
    from mlx_randygpt.sampling.filters import SampleConfig

MAX_HISTORY = 1000  # lines


@click.command("chat", cls=Command)
@checkpoint_option
@sampling_options
@click.option(
    "--replay",
    type=FilePath(path_type=Path),
    help="Replay a conversation that /save has written.",
)
@quantize_option
@backend_option
def command(
    checkpoint: Path | None,
    stop: tuple[str, ...],
    logit_bias: tuple[str, ...],
    replay: Path | None,
    backend: str,
    quantize: int | None,
    **filters: Any,
) -> None:
    """Chat with a trained model, which continues the whole conversation. /help lists commands."""
    from mlx_randygpt.sampling.filters import SampleConfig

    SampleConfig(stop=stop, **filters)  # check the values before loading anything
    loaded = load(checkpoint, backend, quantize)
    bias = parse_biases(logit_bias, loaded.tokenizer)
    converse(loaded, SampleConfig(stop=stop, logit_bias=bias, **filters), replay)


def converse(loaded: Loaded, config: SampleConfig, replay: Path | None = None) -> None:
    """Answer the lines of stdin on stdout until the end of input or /quit."""
    from mlx_randygpt.sampling.chat import Conversation

    conversation = Conversation(loaded.backend, loaded.saved.model, loaded.tokenizer, config)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        echo("/help lists the commands, Ctrl-D quits.", err=True)
    with CtrlC() as ctrl_c, _line_editing() if at_terminal else contextlib.nullcontext():
        if replay is not None:
            _replay(conversation, replay, ctrl_c)
        for line in _lines("> " if at_terminal else "", ctrl_c):
            if line.strip() == "/quit":
                break
            _respond(conversation, line, ctrl_c)
            if ctrl_c.pressed and not at_terminal:
                raise KeyboardInterrupt


def _respond(conversation: Conversation, line: str, ctrl_c: CtrlC) -> None:
    from mlx_randygpt.sampling.chat import ChatError
    from mlx_randygpt.words import unify_newlines, unknown_line

    line = unify_newlines(line)
    if line.startswith("/"):
        try:
            echo(conversation.command(line), err=True)
        except ChatError as error:
            echo(f"Error: {error}", err=True)
        return
    if warning := unknown_line(conversation.tokenizer.unknown(line)):
        echo(warning, err=True)
    ctrl_c.pressed = False
    _stream(conversation.answer(line, lambda: ctrl_c.pressed))


def _replay(conversation: Conversation, path: Path, ctrl_c: CtrlC) -> None:
    from mlx_randygpt.sampling.chat import load_turns

    for turn in load_turns(path):
        echo(turn.prompt, nl=False)
        _stream(conversation.replay(turn, lambda: ctrl_c.pressed))
        if ctrl_c.pressed:
            return
        if conversation.turns[-1].text != turn.text:
            echo("The answer differs from the saved one: is it another model?", err=True)


def _stream(parts: Iterator[str]) -> None:
    """Write the parts as they come, and a newline."""
    for part in parts:
        echo(part, nl=False)
    echo()


def _lines(prompt: str, ctrl_c: CtrlC) -> Iterator[str]:
    """Yield the lines of stdin; with a prompt, Ctrl-C discards the line being typed."""
    while True:
        try:
            with ctrl_c.interrupting():
                line = input(prompt)
            yield line
        except KeyboardInterrupt:
            echo(err=True)
            if not prompt:
                raise
        except EOFError:
            echo(err=True, nl=bool(prompt))
            return


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Restore the history and complete commands, if Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    from mlx_randygpt.sampling.chat import completions

    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(os.path.expanduser(base), "mlx-randygpt", "chat_history")
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(MAX_HISTORY)
    readline.set_completer_delims(" ")
    readline.set_completer(lambda prefix, n: dict(enumerate(completions(prefix))).get(n))
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.is_absolute():  # "~" was expanded, so there is a home folder
                path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
