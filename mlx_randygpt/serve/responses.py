"""Answers as the OpenAI API spells them: whole, or in the pieces of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_randygpt.sampling.generate import Choice, Continuation, shown_length
from mlx_randygpt.serve import ServedModel
from mlx_randygpt.serve.requests import GenerationRequest
from mlx_randygpt.tokenizers import Tokenizer

Body = dict[str, Any]


@dataclass(frozen=True)
class ResponseBuilder:
    """What an answer of one request has in common: who, when, and how tokens are spelled."""

    served: ServedModel
    asked: GenerationRequest
    id: str
    created: int
    is_chat: bool

    def whole(self, writers: Sequence[Continuation]) -> Body:
        """The answer when all texts have ended."""
        build = self._message if self.is_chat else self._text
        choices = [build(i, writer) for i, writer in enumerate(writers)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._frame(kind), "choices": choices, "usage": self.usage(writers)}

    def piece(self, index: int, text: str, logprobs: Body | None, finish: str | None) -> Body:
        """What one text has grown by."""
        choice: Body = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        if self.is_chat:
            choice["delta"] = {"content": text} if text or not finish else {}
        else:
            choice["text"] = text
        return self._piece([choice])

    def opening(self, index: int) -> Body:
        """The first piece of a message: who speaks."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._piece([choice])

    def closing(self, writers: Sequence[Continuation]) -> Body:
        """The last piece where usage was asked for."""
        return {**self._piece([]), "usage": self.usage(writers)}

    def usage(self, writers: Sequence[Continuation]) -> Body:
        read = sum(len(prompt.ids) for prompt in self.asked.prompts)
        written = sum(len(writer.sample.ids) for writer in writers)
        total = read + written
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": total}

    def prefix(self, index: int) -> str:
        """What stands before a text: its prompt, where echo was asked for."""
        return self.asked.prompts[index // self.asked.n].text if self.asked.echo else ""

    def logprobs(
        self, writer: Continuation, part: slice = slice(None), offset: int = 0
    ) -> Body | None:
        """Of a part of the choices; `offset` is where their text begins in the whole."""
        if self.asked.n_likely is None:
            return None
        choices, name = writer.sample.choices[part], token_speller(self.served.tokenizer)
        if self.is_chat:
            return {"content": [_entry(choice, name) for choice in choices], "refusal": None}
        rows: Body = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self.asked.echo and part.start is None:  # nothing stands before the first of a prompt
            _append(rows, name(writer.prompt[0]), None, None, offset)
        for choice in choices:
            likely = {name(i): logprob for i, logprob in choice.likeliest}
            _append(rows, name(choice.token), choice.logprob, likely, offset)
        return rows

    def _text(self, index: int, writer: Continuation) -> Body:
        return {
            "index": index,
            "text": self.prefix(index) + writer.sample.text,
            "logprobs": self.logprobs(writer),
            "finish_reason": writer.sample.finish_reason,
        }

    def _message(self, index: int, writer: Continuation) -> Body:
        message = {"role": "assistant", "content": writer.sample.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(writer),
            "finish_reason": writer.sample.finish_reason,
        }

    def _piece(self, choices: list[Body]) -> Body:
        body = self._frame("chat.completion.chunk" if self.is_chat else "text_completion")
        return {**body, "choices": choices, **({"usage": None} if self.asked.include_usage else {})}

    def _frame(self, kind: str) -> Body:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "seed": self.asked.config.seed,
        }


class StreamState:
    """How far one text of a stream has been told."""

    def __init__(self, spelling: ResponseBuilder, index: int, writer: Continuation) -> None:
        self._spelling, self._index, self._writer = spelling, index, writer
        self._shown = self._told = self._offset = 0  # characters, choices, where those end
        self._begun = self.done = False

    def pieces(self) -> list[Body]:
        """What is new since the last time."""
        sample = self._writer.sample
        finish = sample.finish_reason or None  # read before the text, which it ends
        n_choices, text = len(sample.choices), sample.text
        ready = len(text) if finish else shown_length(text, self._writer.config.stop)
        new, pieces = text[self._shown : max(ready, self._shown)], list[Body]()
        if not (new or finish):
            return []
        if not self._begun:
            new = self._spelling.prefix(self._index) + new
            if self._spelling.is_chat:
                pieces.append(self._spelling.opening(self._index))
        logprobs = self._logprobs(n_choices)
        pieces.append(self._spelling.piece(self._index, new, logprobs, finish))
        self._shown, self._told = max(ready, self._shown), n_choices
        self._begun, self.done = True, finish is not None
        return pieces

    def _logprobs(self, n_choices: int) -> Body | None:
        """Of the choices that were not told yet."""
        part = slice(self._told if self._begun else None, n_choices)
        rows = self._spelling.logprobs(self._writer, part, self._offset)
        if rows and rows.get("tokens"):
            self._offset = rows["text_offset"][-1] + len(rows["tokens"][-1])
        return rows


def token_speller(tokenizer: Tokenizer) -> Callable[[int], str]:
    """token id -> its text; begin and end of a text have names."""
    names = {tokenizer.bos: "<bos>", tokenizer.eos: "<eos>"}
    return lambda token: tokenizer.decode([token]) or names.get(token, "")


def _append(rows: Body, token: str, logprob: float | None, top: Body | None, first: int) -> None:
    """One token more; it begins where the one before it ended, the first at `first`."""
    at = rows["text_offset"][-1] + len(rows["tokens"][-1]) if rows["tokens"] else first
    values = {"tokens": token, "token_logprobs": logprob, "top_logprobs": top, "text_offset": at}
    for name, value in values.items():
        rows[name].append(value)


def _entry(choice: Choice, name: Callable[[int], str]) -> Body:
    """One token as the chat API spells it."""
    others = [_token(name(i), p) for i, p in choice.likeliest]
    return {**_token(name(choice.token), choice.logprob), "top_logprobs": others}


def _token(text: str, logprob: float) -> Body:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}
