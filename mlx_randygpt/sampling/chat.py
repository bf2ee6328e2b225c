"""A conversation with a model: its turns and its commands.

A model of dialogue gets the turns as it was trained on them. For any other, each input is appended
to the text so far on its own line, and the model continues from there. An answer depends only on
the turns before it, the settings and the seed, so a saved conversation can be replayed word for
word.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from mlx_randygpt import files
from mlx_randygpt.backends.base import Scorer
from mlx_randygpt.config import ConfigError, ModelConfig, UserError
from mlx_randygpt.dialogue import Turn as Said
from mlx_randygpt.dialogue import fit_prompt, has_dialogue, render, render_prompt
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Generated, generate, shown_length
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.words import one_line, unify_newlines

SETTINGS = {  # command -> (field of SampleConfig, its type, what it does)
    "/temp": ("temperature", float, "temperature; 0 always picks the likeliest"),
    "/topp": ("top_p", float, "the likeliest tokens up to this sum; 1 is off"),
    "/topk": ("top_k", int, "the k likeliest; 0 is off"),
    "/minp": ("min_p", float, "at least this share of the likeliest; 0 is off"),
    "/typical": ("typical_p", float, "keep tokens of typical probability; 1 is off"),
    "/rep": ("repetition_penalty", float, "repetition penalty; 1 is off"),
    "/len": ("max_tokens", int, "maximum number of tokens in an answer"),
    "/seed": ("seed", int, "seed; counts from the next answer"),
}
OTHER_COMMANDS = {
    "/retry": "answer the last prompt again, with the next seed",
    "/undo": "forget the last prompt and its answer",
    "/system": "TEXT: set the system message; without TEXT, remove it",
    "/reset": "forget the conversation",
    "/show": "show the settings and the length of the conversation",
    "/save": "FILE: save the conversation, for --replay",
    "/help": "show this list",
    "/quit": "leave",
}
COMMANDS = (*SETTINGS, *OTHER_COMMANDS)


class ChatError(UserError, ValueError):
    """An invalid command or saved conversation; the message says what would be valid."""


@dataclass(frozen=True)
class Turn:
    """One input, its settings and the answer."""

    prompt: str
    config: SampleConfig
    text: str = ""
    fresh: bool = True  # the first turn of a conversation
    system: str = ""  # message, for a model of dialogue


@dataclass
class Conversation:
    """A conversation in progress; `config.seed` is that of the first answer since it was set."""

    backend: Scorer
    model: ModelConfig
    tokenizer: Tokenizer
    config: SampleConfig
    notify: Callable[[str], None] = lambda text: None  # about what the model does not see
    turns: list[Turn] = field(default_factory=list)
    first: int = 0  # of the turns that are not forgotten
    answered: int = 0  # answers since the seed was set
    system: str = ""  # message, for a model of dialogue

    @property
    def is_dialogue(self) -> bool:
        """Return whether the model was trained on dialogue."""
        return has_dialogue(self.tokenizer)

    @property
    def history(self) -> str:
        """Return prompts and answers as one text, each prompt on a line of its own."""
        text = ""
        for turn in self.turns[self.first :]:
            text += _on_new_line(text, turn.prompt) + turn.text
        return text

    def answer(self, prompt: str, should_stop: Callable[[], bool]) -> Iterator[str]:
        """Yield the answer piece by piece; what was generated before a stop is kept."""
        config = replace(self.config, seed=self.config.seed + self.answered)
        prompt = unify_newlines(prompt)
        ids = self._dialogue_ids(prompt) if self.is_dialogue else self._text_ids(prompt)
        sample, shown = Generated(), 0
        for [sample] in generate(
            self.backend, self.model, self.tokenizer, ids, config, should_stop=should_stop
        ):
            done = bool(sample.finish_reason)
            ready = len(sample.text) if done else shown_length(sample.text, config.stop)
            yield sample.text[shown:ready]
            shown = max(shown, ready)
        yield sample.text[shown:]
        self.answered += 1
        fresh = len(self.turns) == self.first
        self.turns.append(Turn(prompt, config, sample.text, fresh, self.system))

    def _text_ids(self, prompt: str) -> list[int]:
        history = self.history
        context = history + _on_new_line(history, prompt)
        ids: list[int] = self.tokenizer.encode(context).tolist()
        return ids or [self.tokenizer.bos]

    def _dialogue_ids(self, prompt: str) -> list[int]:
        """Return the ids of the conversation; report what of it does not fit into the context."""
        size = self.model.block_size
        said = [*self._said(), Said("user", prompt)]
        kept, n_dropped = fit_prompt(said, self.tokenizer, size, self.config.max_tokens)
        ids: list[int] = render_prompt(kept, self.tokenizer).tolist()
        if n_dropped:
            one = n_dropped == 1
            turns = "the oldest turn was" if one else f"the {n_dropped} oldest turns were"
            self.notify(f"{turns} left out: with the answer, the context of {size} tokens is full")
        if len(ids) > size:
            self.notify(f"this prompt has {len(ids)} tokens, the context {size}: its end is used")
        return ids

    def _said(self) -> list[Said]:
        """Return the system message, and the prompts and answers that are not forgotten."""
        said = [Said("system", self.system)] if self.system else []
        for turn in self.turns[self.first :]:
            said += [Said("user", turn.prompt), Said("assistant", turn.text)]
        return said

    def retry(self, should_stop: Callable[[], bool]) -> Iterator[str]:
        """Answer the last prompt again, with the next seed; ChatError if there is none."""
        return self.answer(self._forget_last().prompt, should_stop)

    def command(self, line: str) -> str:
        """Run a line that begins with "/" and return the reply; ChatError if it is invalid."""
        name, _, value = line.strip().partition(" ")
        if name in SETTINGS:
            return self._set(name, value.strip())
        if name == "/system":
            return self._set_system(value.strip())
        if name == "/save":
            return self.save(Path(expanduser(value.strip()))) if value.strip() else _needs_file()
        actions = {
            "/undo": self._undo,
            "/reset": self._reset,
            "/show": self._show,
            "/help": _help,
        }
        if name not in actions:
            raise ChatError(
                f"{reprlib.repr(name)} is not a command; use one of {', '.join(COMMANDS)}"
            )
        return actions[name]()

    def save(self, path: Path) -> str:
        """Write all turns to a file, as JSON."""
        turns = [asdict(turn) for turn in self.turns]
        try:
            content = json.dumps({"format": "mlxgpt chat", "turns": turns}, indent=1) + "\n"
            files.write(path, content.encode())
        except OSError as error:
            raise ChatError(f"could not write {path}: {error.strerror}") from error
        return f"saved {len(turns)} answer{'s' * (len(turns) != 1)} to {path}"

    def replay(self, turn: Turn, should_stop: Callable[[], bool]) -> Iterator[str]:
        """Repeat a saved turn; `turns[-1].text` holds the new answer, for comparison."""
        if turn.fresh:
            self._reset()
        if turn.system != self.system:
            self._set_system(turn.system)
        self.config, self.answered = turn.config, 0
        yield from self.answer(turn.prompt, should_stop)

    def _set(self, name: str, value: str) -> str:
        key, kind, _ = SETTINGS[name]
        try:
            number = kind(value)
        except ValueError:
            number_kind = "a whole number" if kind is int else "a number"
            raise ChatError(f"{name} takes {number_kind}, such as {name} {_example(key)}") from None
        try:
            self.config = replace(self.config, **{key: number})
        except ConfigError as error:
            raise ChatError(str(error)) from error
        self.answered = 0 if key == "seed" else self.answered
        return f"{key} = {number}"

    def _set_system(self, text: str) -> str:
        if not self.is_dialogue:
            raise ChatError("/system is for models of dialogue; this one continues text")
        self.system = unify_newlines(text)
        return "system message set" if text else "no system message"

    def _undo(self) -> str:
        return f"forgot {reprlib.repr(self._forget_last().prompt)} and its answer"

    def _forget_last(self) -> Turn:
        if len(self.turns) == self.first:
            raise ChatError("there is no answer yet; type a prompt first")
        return self.turns.pop()

    def _reset(self) -> str:
        self.first = len(self.turns)
        return "conversation forgotten"

    def _show(self) -> str:
        values = {name: getattr(self.config, key) for name, (key, _, _) in SETTINGS.items()}
        values["/seed"] = self.config.seed + self.answered
        lines = [f"{name} {value}" for name, value in values.items()]
        if self.is_dialogue:
            lines.append(f"/system {self.system}")
            n = len(render(self._said(), self.tokenizer).ids)
        else:
            n = len(self.tokenizer.encode(self.history))
        return "\n".join([*lines, f"{n} tokens so far, context {self.model.block_size}"])


def load_turns(path: Path) -> list[Turn]:
    """Return the turns of a saved conversation; raise ChatError if the file is invalid."""
    try:
        content = json.loads(files.read_text(path))
    except OSError as error:
        raise ChatError(f"could not read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{path} is not a saved conversation: it is not JSON") from error
    try:
        if content["format"] != "mlxgpt chat":
            raise ValueError("its format is not 'mlxgpt chat'")
        return [_turn(turn) for turn in content["turns"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ChatError(f"{path} is not a saved conversation: {one_line(error)}") from error


def _turn(values: dict[str, Any]) -> Turn:
    config = dict(values["config"])
    config["stop"] = tuple(config["stop"])
    config["logit_bias"] = tuple((int(i), float(x)) for i, x in config["logit_bias"])
    prompt, text, system = values["prompt"], values["text"], values.get("system", "")
    if not all(isinstance(value, str) for value in (prompt, text, system)):
        raise ValueError("a prompt, an answer or a system message is not text")
    return Turn(prompt, SampleConfig(**config), text, bool(values["fresh"]), system)


def completions(prefix: str) -> list[str]:
    """Return the commands that start with `prefix`."""
    return [n for n in COMMANDS if n.startswith(prefix)] if prefix.startswith("/") else []


def _on_new_line(history: str, prompt: str) -> str:
    return "\n" * bool(history and not history.endswith("\n")) + prompt


def _example(key: str) -> object:
    return getattr(SampleConfig(), key)


def _needs_file() -> str:
    raise ChatError("/save needs a file name, such as /save chat.json")


def _help() -> str:
    lines = [f"{name} X".ljust(12) + text for name, (_, _, text) in SETTINGS.items()]
    lines += [name.ljust(12) + text for name, text in OTHER_COMMANDS.items()]
    return "\n".join([*lines, "Anything else is a prompt. Ctrl-C stops an answer, Ctrl-D leaves."])
