"""A conversation with a model that continues text: what was said so far, and the commands.

What is typed is put behind all that was said, on a line of its own, and the model goes on from
there; each answer is
decided by the text so far, the settings and the number of the turn, so that a conversation that was
saved can be had again word for word. Knows no terminal.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from mlx_randygpt.backends.base import Scorer
from mlx_randygpt.config import ConfigError, ModelConfig, UserError
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Generated, generate, unambiguous
from mlx_randygpt.tokenizers.chars import Tokenizer

SETTINGS = {  # command -> (field of SampleConfig, its type, what it does)
    "/temp": ("temperature", float, "temperature; 0 always takes the likeliest"),
    "/topp": ("top_p", float, "the likeliest tokens up to this sum; 1 is off"),
    "/topk": ("top_k", int, "the k likeliest; 0 is off"),
    "/minp": ("min_p", float, "at least this share of the likeliest; 0 is off"),
    "/typical": ("typical_p", float, "about as surprising as the average; 1 is off"),
    "/rep": ("repetition_penalty", float, "repetition penalty; 1 is off"),
    "/len": ("max_tokens", int, "tokens of an answer at most"),
    "/seed": ("seed", int, "seed; the next answer is its first"),
}  # fmt: skip
OTHERS = {
    "/reset": "forget what was said",
    "/show": "the settings, and how much was said",
    "/save": "FILE: keep the conversation, for --replay",
    "/help": "this list",
    "/quit": "leave",
}
COMMANDS = (*SETTINGS, *OTHERS)


class ChatError(UserError, ValueError):
    """A command or a saved conversation that does not fit; the message says what would."""


@dataclass(frozen=True)
class Turn:
    """What was typed, under which settings, and the answer."""

    prompt: str
    config: SampleConfig
    text: str = ""
    fresh: bool = True  # nothing was said before it


@dataclass
class Conversation:
    """What was said so far; `config.seed` is that of the first answer since it was set."""

    backend: Scorer
    model: ModelConfig
    tokenizer: Tokenizer
    config: SampleConfig
    turns: list[Turn] = field(default_factory=list)
    said: str = ""
    answered: int = 0  # since the seed was set

    def answer(self, prompt: str, should_stop: Callable[[], bool]) -> Iterator[str]:
        """The parts of the answer as they are made; what was written until a stop counts."""
        config = replace(self.config, seed=self.config.seed + self.answered)
        fresh = not self.said
        context = self.said + "\n" * (not fresh and not self.said.endswith("\n")) + prompt
        ids = self.tokenizer.encode(context).tolist() or [self.tokenizer.bos]
        sample, shown = Generated(), 0
        for [sample] in generate(
            self.backend, self.model, self.tokenizer, ids, config, should_stop=should_stop
        ):
            done = bool(sample.finish_reason)
            ready = len(sample.text) if done else unambiguous(sample.text, config.stop)
            yield sample.text[shown:ready]
            shown = max(shown, ready)
        yield sample.text[shown:]
        self.said, self.answered = context + sample.text, self.answered + 1
        self.turns.append(Turn(prompt, config, sample.text, fresh))

    def command(self, line: str) -> str:
        """Carry out a line that begins with "/"; what to tell. ChatError where it does not fit."""
        name, _, value = line.strip().partition(" ")
        if name in SETTINGS:
            return self._set(name, value.strip())
        if name == "/save":
            return self.save(Path(expanduser(value.strip()))) if value.strip() else _needs_file()
        known = {"/reset": self._reset, "/show": self._show, "/help": _help}
        if name not in known:
            raise ChatError(f"{reprlib.repr(name)} is unknown; it is one of {', '.join(COMMANDS)}")
        return known[name]()

    def save(self, path: Path) -> str:
        """Write all turns as JSON."""
        turns = [asdict(turn) for turn in self.turns]
        try:
            path.write_text(json.dumps({"format": "mlxgpt chat", "turns": turns}, indent=1) + "\n")
        except OSError as error:
            raise ChatError(f"could not write {path}: {error.strerror}") from error
        return f"saved {len(turns)} answer{'s' * (len(turns) != 1)} to {path}"

    def again(self, turn: Turn, should_stop: Callable[[], bool]) -> Iterator[str]:
        """Say once more what was said; `turns[-1].text` then tells whether it is the same."""
        if turn.fresh:
            self._reset()
        self.config, self.answered = turn.config, 0
        yield from self.answer(turn.prompt, should_stop)

    def _set(self, name: str, value: str) -> str:
        key, kind, _ = SETTINGS[name]
        try:
            number = kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ChatError(f"{name} takes {what}, such as {name} {_example(key)}") from None
        try:
            self.config = replace(self.config, **{key: number})
        except ConfigError as error:
            raise ChatError(str(error)) from error
        self.answered = 0 if key == "seed" else self.answered
        return f"{key} = {number}"

    def _reset(self) -> str:
        self.said = ""
        return "forgotten"

    def _show(self) -> str:
        values = {name: getattr(self.config, key) for name, (key, _, _) in SETTINGS.items()}
        values["/seed"] = self.config.seed + self.answered
        lines = [f"{name} {value}" for name, value in values.items()]
        n = len(self.tokenizer.encode(self.said))
        return "\n".join([*lines, f"{n} tokens said, context {self.model.block_size}"])


def saved_turns(path: Path) -> list[Turn]:
    """The turns of a `/save`; ChatError says what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ChatError(f"could not read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{path} is not a saved conversation: it is not JSON") from error
    try:
        if content["format"] != "mlxgpt chat":
            raise ValueError("its format is another")
        return [_turn(turn) for turn in content["turns"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ChatError(f"{path} is not a saved conversation: {reason}") from error


def _turn(values: dict[str, Any]) -> Turn:
    config = dict(values["config"])
    config["stop"] = tuple(config["stop"])
    config["logit_bias"] = tuple((int(i), float(x)) for i, x in config["logit_bias"])
    prompt, text = values["prompt"], values["text"]
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise ValueError("a prompt or an answer is not text")
    return Turn(prompt, SampleConfig(**config), text, bool(values["fresh"]))


def completions(begun: str) -> list[str]:
    """The commands that begin so."""
    return [name for name in COMMANDS if name.startswith(begun)] if begun.startswith("/") else []


def _example(key: str) -> object:
    return getattr(SampleConfig(), key)


def _needs_file() -> str:
    raise ChatError("/save takes the name of a file, such as /save talk.json")


def _help() -> str:
    lines = [f"{name} X".ljust(12) + what for name, (_, _, what) in SETTINGS.items()]
    lines += [name.ljust(12) + what for name, what in OTHERS.items()]
    return "\n".join([*lines, "anything else is a prompt; Ctrl-C stops a text, Ctrl-D leaves"])
