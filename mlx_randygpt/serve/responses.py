"""Responses in the format of the OpenAI API: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

from mlx_randygpt.sampling.generate import Continuation, shown_length
from mlx_randygpt.serve import ServedModel
from mlx_randygpt.serve.http import event
from mlx_randygpt.serve.requests import GenerationRequest

Body = dict[str, Any]

MARK = "\0"  # the place of the text in an event that is built once
MAX_ENTRIES = 256  # tokens and alternatives in a chunk of a stream, which is built in one go


@dataclass(frozen=True)
class ResponseBuilder:
    """Build the responses to one request."""

    served: ServedModel
    generation: GenerationRequest
    id: str
    created: int
    is_chat: bool

    def whole(self, texts: Sequence[Continuation]) -> Body:
        """Return the response when all texts have ended."""
        build = self._message if self.is_chat else self._text
        choices = [build(i, text) for i, text in enumerate(texts)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._frame(kind), "choices": choices, "usage": self.generation.usage(texts)}

    def piece(self, index: int, text: str, logprobs: Body | None, finish: str | None) -> Body:
        """Return the chunk with what one text has grown by."""
        choice: Body = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        if self.is_chat:
            choice["delta"] = {"content": text} if text or not finish else {}
        else:
            choice["text"] = text
        return self._piece([choice])

    def opening(self, index: int) -> Body:
        """Return the first chunk of a message, which has its role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._piece([choice])

    def closing(self, texts: Sequence[Continuation]) -> Body:
        """Return the last chunk of a stream that includes its usage."""
        return {**self._piece([]), "usage": self.generation.usage(texts)}

    def prefix(self, index: int) -> str:
        """Return the text's prompt if the request has `echo`, else nothing."""
        return (
            self.generation.prompts[index // self.generation.n].text if self.generation.echo else ""
        )

    def logprobs(self, rows: Sequence[Row], length: int) -> Body:
        """Return log-probabilities in the format of the API; the text has `length` characters."""
        spell = self.served.spell
        if self.is_chat:
            return {"content": [_entry(row, spell) for row in rows], "refusal": None}
        return {
            "tokens": [spell(row.token) for row in rows],
            "token_logprobs": [_finite(row.logprob) for row in rows],
            "top_logprobs": [
                None if row.likeliest is None else {spell(i): _finite(p) for i, p in row.likeliest}
                for row in rows
            ],
            "text_offset": [min(row.begin, length) for row in rows],
        }

    def _all_logprobs(self, index: int, text: Continuation) -> Body | None:
        if self.generation.n_likely is None:
            return None
        length = len(self.prefix(index)) + len(text.sample.text)
        return self.logprobs(Rows(self, index, text).take(sys.maxsize), length)

    def _text(self, index: int, text: Continuation) -> Body:
        return {
            "index": index,
            "text": self.prefix(index) + text.sample.text,
            "logprobs": self._all_logprobs(index, text),
            "finish_reason": text.sample.finish_reason,
        }

    def _message(self, index: int, text: Continuation) -> Body:
        message = {"role": "assistant", "content": text.sample.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._all_logprobs(index, text),
            "finish_reason": text.sample.finish_reason,
        }

    def _piece(self, choices: list[Body]) -> Body:
        body = self._frame("chat.completion.chunk" if self.is_chat else "text_completion")
        return {
            **body,
            "choices": choices,
            **({"usage": None} if self.generation.include_usage else {}),
        }

    def _frame(self, kind: str) -> Body:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "seed": self.generation.config.seed,
            "warnings": list(self.generation.warnings),
        }


class Row(NamedTuple):
    """A token with its log-probability, and the character at which it begins in the text."""

    token: int
    logprob: float | None  # None: the first of a prompt
    likeliest: Sequence[tuple[int, float]] | None
    begin: int


class Rows:
    """The tokens of one growing text in order, those of an echoed prompt included.

    A token of a stop text that was cut off begins where the text ends.
    """

    def __init__(self, builder: ResponseBuilder, index: int, text: Continuation) -> None:
        generation, self._text = builder.generation, text
        prompt = generation.prompts[index // generation.n].ids
        self._n_prompt = len(prompt) if generation.echo else 0
        self._prefix = len(builder.prefix(index))
        self._new_decoder = builder.served.tokenizer.decoder
        self._decode = self._new_decoder()
        self._n = self.end = 0  # rows taken; where the last of them ends

    def take(self, most: int, shown: int = sys.maxsize) -> list[Row]:
        """Return at most `most` of the next rows that begin before the character `shown`."""
        rows: list[Row] = []
        while len(rows) < most and self._is_ready() and self.end < shown:
            rows.append(self._next())
        return rows

    def _is_ready(self) -> bool:
        return self._n < len(self._text.sample.choices) + (self._n_prompt > 0)

    def _next(self) -> Row:
        if self._n == self._n_prompt > 0:  # the prompt's text is as it was sent, not as decoded
            self._decode, self.end = self._new_decoder(), self._prefix
        begin = self.end
        if self._n_prompt and self._n == 0:
            row = Row(self._text.prompt[0], None, None, begin)
        else:
            choice = self._text.sample.choices[self._n - (self._n_prompt > 0)]
            row = Row(choice.token, choice.logprob, choice.likeliest, begin)
        self.end += len(self._decode(row.token))
        if self._n < self._n_prompt:
            self.end = min(self.end, self._prefix)
        self._n += 1
        return row


class StreamState:
    """How much of one streamed text was sent.

    Nearly all events of a stream differ in their text alone, so what surrounds it is built once.
    """

    def __init__(self, builder: ResponseBuilder, index: int, text: Continuation) -> None:
        self._builder, self._index, self._text = builder, index, text
        self._prefix, self._n_likely = builder.prefix(index), builder.generation.n_likely
        self._rows = None if self._n_likely is None else Rows(builder, index, text)
        self._sent = 0  # characters, prefix included
        self._begun = self.done = False
        plain = event(builder.piece(index, MARK, None, None))
        self._before, _, self._after = plain.rpartition(json.dumps(MARK).encode("ascii"))

    def events(self) -> bytes:
        """Return events with what is new since the last call, MAX_ENTRIES of it at most."""
        sample = self._text.sample
        finish = sample.finish_reason or None  # read before the text: the engine sets it last
        text, opening, logprobs = sample.text, b"", None
        ready = len(text) if finish else shown_length(text, self._text.config.stop)
        if not (ready or finish):
            return b""
        length = end = len(self._prefix) + ready
        rows: list[Row] = []
        if self._rows is not None:
            most = max(1, MAX_ENTRIES // (1 + (self._n_likely or 0)))
            rows = self._rows.take(most, sys.maxsize if finish else length)
            logprobs = self._builder.logprobs(rows, length)
            if len(rows) == most:  # the rest comes with the next chunk
                end, finish = min(self._rows.end, length), None
        if not (rows or end > self._sent or finish):
            return b""
        if self._builder.is_chat and not self._begun:
            opening = event(self._builder.opening(self._index))
        self._begun, self.done = True, finish is not None
        new = self._take(text, end)
        if finish is None and logprobs is None:
            return opening + self._before + json.dumps(new).encode("ascii") + self._after
        return opening + event(self._builder.piece(self._index, new, logprobs, finish))

    def _take(self, text: str, end: int) -> str:
        """Return the characters that were not sent yet, up to `end`."""
        begin, self._sent, n = self._sent, max(self._sent, end), len(self._prefix)
        return self._prefix[begin:end] + text[max(begin - n, 0) : max(end - n, 0)]


def _entry(row: Row, spell: Callable[[int], str]) -> Body:
    """Return one token in the format of the chat API."""
    others = [_token(spell(i), p) for i, p in row.likeliest or ()]
    return {**_token(spell(row.token), row.logprob), "top_logprobs": others}


def _token(text: str, logprob: float | None) -> Body:
    return {
        "token": text,
        "logprob": _finite(logprob),
        "bytes": list(text.encode(errors="replace")),
    }


def _finite(logprob: float | None) -> float | None:
    """Return a log-probability as JSON can hold it."""
    return logprob if logprob is not None and isfinite(logprob) else None
