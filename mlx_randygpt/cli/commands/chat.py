"""`mlxgpt chat`: a conversation at the terminal, or with a script through a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import Loaded, biases, load
from mlx_randygpt.cli.options import (
    backend_option,
    checkpoint_option,
    quantize_option,
    sampling_options,
)
from mlx_randygpt.cli.signals import CtrlC

if TYPE_CHECKING:
    from mlx_randygpt.sampling.chat import Conversation
    from mlx_randygpt.sampling.filters import SampleConfig

N_REMEMBERED = 1000  # lines of history


@click.command("chat", cls=Command)
@checkpoint_option
@sampling_options
@click.option(
    "--replay",
    type=click.Path(path_type=Path),
    help="Have a conversation again that was kept with /save.",
)
@quantize_option
@backend_option
def command(
    checkpoint: Path | None, stop: tuple[str, ...], logit_bias: tuple[str, ...],
    replay: Path | None, backend: str, quantize: int | None, **filters: Any,
) -> None:  # fmt: skip
    """Talk with a trained model: it goes on from all that was said. /help lists the commands."""
    from mlx_randygpt.sampling.filters import SampleConfig

    SampleConfig(stop=stop, **filters)
    loaded = load(checkpoint, backend, quantize)
    bias = biases(logit_bias, loaded.tokenizer)
    converse(loaded, SampleConfig(stop=stop, logit_bias=bias, **filters), replay)


def converse(loaded: Loaded, config: SampleConfig, replay: Path | None = None) -> None:
    """Prompts from stdin, answers to stdout, until the end of input or /quit."""
    from mlx_randygpt.sampling.chat import Conversation

    talk = Conversation(loaded.backend, loaded.saved.model, loaded.tokenizer, config)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        click.echo("/help lists the commands, Ctrl-D leaves.", err=True)
    with CtrlC() as ctrl_c, _line_editing() if at_terminal else contextlib.nullcontext():
        if replay is not None:
            _replay(talk, replay, ctrl_c)
        for line in _lines("> " if at_terminal else "", ctrl_c):
            if line.strip() == "/quit":
                break
            _respond(talk, line, ctrl_c)
            if ctrl_c.pressed and not at_terminal:
                raise KeyboardInterrupt


def _respond(talk: Conversation, line: str, ctrl_c: CtrlC) -> None:
    from mlx_randygpt.cli.training.text import unknown_line
    from mlx_randygpt.sampling.chat import ChatError

    if line.startswith("/"):
        try:
            click.echo(talk.command(line), err=True)
        except ChatError as error:
            click.echo(f"Error: {error}", err=True)
        return
    if lost := unknown_line(talk.tokenizer.unknown(line)):
        click.echo(lost, err=True)
    ctrl_c.pressed = False
    _stream(talk.answer(line, lambda: ctrl_c.pressed))


def _replay(talk: Conversation, path: Path, ctrl_c: CtrlC) -> None:
    from mlx_randygpt.sampling.chat import load_turns

    for turn in load_turns(path):
        click.echo(turn.prompt, nl=False)
        _stream(talk.replay(turn, lambda: ctrl_c.pressed))
        if ctrl_c.pressed:
            return
        if talk.turns[-1].text != turn.text:
            click.echo("The answer differs from the one that was saved: another model?", err=True)


def _stream(parts: Iterator[str]) -> None:
    """Write what comes, and a line's end."""
    for part in parts:
        sys.stdout.write(part)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _lines(prompt: str, ctrl_c: CtrlC) -> Iterator[str]:
    """Lines as they are typed; at a terminal Ctrl-C begins a new one. The end of input ends."""
    while True:
        try:
            with ctrl_c.interrupting():
                line = input(prompt)
            yield line
        except KeyboardInterrupt:
            click.echo(err=True)
            if not prompt:
                raise
        except EOFError:
            click.echo(err=True, nl=bool(prompt))
            return


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """History from the last time and completion of commands, where Python has readline."""
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
    readline.set_history_length(N_REMEMBERED)
    readline.set_completer_delims(" ")
    readline.set_completer(lambda begun, n: dict(enumerate(completions(begun))).get(n))
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.is_absolute():  # else nobody is at home
                path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
