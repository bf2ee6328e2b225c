"""`mlxgpt chat`: a conversation in the terminal, or with a script through a pipe."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
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
from mlx_randygpt.cli.output import echo, echo_notice, styled, wrap
from mlx_randygpt.cli.signals import CtrlC
from mlx_randygpt.cli.values import FilePath

if TYPE_CHECKING:
    from mlx_randygpt.sampling.chat import Conversation, Turn
    from mlx_randygpt.sampling.filters import SampleConfig

MAX_HISTORY = 1000  # lines
PROMPT = "> "


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
    """Chat with a trained model. /help lists the commands of the conversation.

    A model that was not trained on dialogue does not answer: it continues the conversation as text.
    """
    from mlx_randygpt.sampling.filters import SampleConfig

    SampleConfig(stop=stop, **filters)  # check the values before loading anything
    loaded = load(checkpoint, backend, quantize)
    bias = parse_biases(logit_bias, loaded.tokenizer)
    converse(loaded, SampleConfig(stop=stop, logit_bias=bias, **filters), replay)


def converse(loaded: Loaded, config: SampleConfig, replay: Path | None = None) -> None:
    """Answer the lines of stdin on stdout until the end of input or /quit."""
    from mlx_randygpt.backends import release_memory
    from mlx_randygpt.sampling.chat import Conversation, load_turns

    saved_turns = [] if replay is None else load_turns(replay)
    model, tokenizer = loaded.saved.model, loaded.tokenizer
    conversation = Conversation(loaded.backend, model, tokenizer, config, echo_notice)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    lines = "\n".join(introduction(loaded))
    if at_terminal:
        keys = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D quits."
        lines = "\n".join(wrap(f"{lines}\n{keys}"))
    echo(lines, err=True)
    with CtrlC() as ctrl_c, _line_editing() if at_terminal else contextlib.nullcontext():
        _replay(conversation, saved_turns, ctrl_c)
        for line in _lines(at_terminal, ctrl_c):
            if line.strip() == "/quit":
                break
            _respond(conversation, line, ctrl_c)
            release_memory(loaded.backend)
            if ctrl_c.pressed and not at_terminal:
                raise KeyboardInterrupt


def introduction(loaded: Loaded) -> Iterator[str]:
    """Yield the lines that say which model this is, how large and how good."""
    from mlx_randygpt.dialogue import has_dialogue
    from mlx_randygpt.model import parameter_count

    model, progress = loaded.saved.model, loaded.saved.progress
    is_dialogue = has_dialogue(loaded.tokenizer)
    yield f"Model: {loaded.path}"
    yield f"Size: {parameter_count(model):,} parameters, context {model.block_size:,} tokens"
    if math.isfinite(progress.val_loss):
        text = "the answers of the validation text" if is_dialogue else "the validation text"
        yield f"Loss: {progress.val_loss:.4f} on {text}, at step {progress.eval_step:,}"
    else:
        yield "Loss: not evaluated"
    if not is_dialogue:
        yield "This model continues text and does not answer: it was not trained on dialogue."


def _respond(conversation: Conversation, line: str, ctrl_c: CtrlC) -> None:
    from mlx_randygpt.sampling.chat import ChatError
    from mlx_randygpt.words import unify_newlines, unknown_line

    line, ctrl_c.pressed = unify_newlines(line), False
    try:
        if line.strip() == "/retry":
            _stream(conversation.retry(lambda: ctrl_c.pressed))
        elif line.startswith("/"):
            echo_notice(conversation.command(line))
        else:
            if warning := unknown_line(conversation.tokenizer.unknown(line)):
                echo_notice(warning)
            _stream(conversation.answer(line, lambda: ctrl_c.pressed))
    except ChatError as error:
        echo_notice(f"Error: {error}", is_error=True)


def _replay(conversation: Conversation, turns: list[Turn], ctrl_c: CtrlC) -> None:
    for turn in turns:
        begin = f"\n{PROMPT * conversation.is_dialogue}" if sys.stdout.isatty() else ""
        echo(begin + turn.prompt, nl=conversation.is_dialogue)
        _stream(conversation.replay(turn, lambda: ctrl_c.pressed))
        if ctrl_c.pressed:
            return
        if conversation.turns[-1].text != turn.text:
            echo_notice("The answer differs from the saved one: is it another model?")


def _stream(parts: Iterator[str]) -> None:
    """Write the parts as they come, and a newline; on a terminal lines end between words."""
    if not sys.stdout.isatty():
        for part in parts:
            echo(part, nl=False)
        echo()
        return
    from mlx_randygpt.cli.wrapping import WordWrapper

    wrapper = WordWrapper(shutil.get_terminal_size().columns)
    for part in parts:
        echo(wrapper.add(part), nl=False)
    echo(wrapper.end())


def _lines(at_terminal: bool, ctrl_c: CtrlC) -> Iterator[str]:
    """Yield the lines of stdin; at a terminal, Ctrl-C discards the line being typed."""
    prompt = styled(PROMPT, fg="cyan", bold=True)
    if prompt != PROMPT:  # for readline, which counts the columns
        prompt = prompt.replace(PROMPT, f"\x02{PROMPT}\x01")
        prompt = f"\x01{prompt}\x02"
    while True:
        try:
            if at_terminal:
                echo()
            with ctrl_c.interrupting():
                line = input(prompt if at_terminal else "")
            yield line
        except KeyboardInterrupt:
            echo(err=True)
            if not at_terminal:
                raise
        except EOFError:
            echo(err=True, nl=at_terminal)
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
