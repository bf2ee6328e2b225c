"""Responses in the format of the OpenAI API: whole, or as the chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mlx_randygpt.sampling.generate import Choice, Continuation, shown_length
from mlx_randygpt.serve import ServedModel
from mlx_randygpt.serve.requests import GenerationRequest
from mlx_randygpt.tokenizers import token_speller

Body = dict[str, Any]


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

    def logprobs(
        self, text: Continuation, part: slice = slice(None), offset: int = 0
    ) -> Body | None:
        """Return log-probabilities of a part of the choices, which begins at character `offset`."""
        if self.generation.n_likely is None:
            return None
        choices, spell = text.sample.choices[part], token_speller(self.served.tokenizer)
        if self.is_chat:
            return {"content": [_entry(choice, spell) for choice in choices], "refusal": None}
        rows: Body = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if (
            self.generation.echo and part.start is None
        ):  # a prompt's first token has no log-probability
            _append(rows, spell(text.prompt[0]), None, None, offset)
        for choice in choices:
            likely = {spell(i): _finite(logprob) for i, logprob in choice.likeliest}
            _append(rows, spell(choice.token), _finite(choice.logprob), likely, offset)
        return rows

    def _text(self, index: int, text: Continuation) -> Body:
        return {
            "index": index,
            "text": self.prefix(index) + text.sample.text,
            "logprobs": self.logprobs(text),
            "finish_reason": text.sample.finish_reason,
        }

    def _message(self, index: int, text: Continuation) -> Body:
        message = {"role": "assistant", "content": text.sample.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(text),
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
        }


class StreamState:
    """How much of one streamed text was sent."""

    def __init__(self, builder: ResponseBuilder, index: int, text: Continuation) -> None:
        self._builder, self._index, self._text = builder, index, text
        self._n_characters = self._n_choices = self._offset = 0  # sent; where those choices end
        self._begun = self.done = False

    def pieces(self) -> list[Body]:
        """Return the chunks with what is new since the last call."""
        sample = self._text.sample
        finish = sample.finish_reason or None  # read before the text: the engine sets it last
        n_choices, text = len(sample.choices), sample.text
        ready = len(text) if finish else shown_length(text, self._text.config.stop)
        new, pieces = text[self._n_characters : max(ready, self._n_characters)], list[Body]()
        if not (new or finish):
            return []
        if not self._begun:
            new = self._builder.prefix(self._index) + new
            if self._builder.is_chat:
                pieces.append(self._builder.opening(self._index))
        logprobs = self._logprobs(n_choices)
        pieces.append(self._builder.piece(self._index, new, logprobs, finish))
        self._n_characters, self._n_choices = max(ready, self._n_characters), n_choices
        self._begun, self.done = True, finish is not None
        return pieces

    def _logprobs(self, n_choices: int) -> Body | None:
        """Return log-probabilities of the choices that were not sent yet."""
        part = slice(self._n_choices if self._begun else None, n_choices)
        rows = self._builder.logprobs(self._text, part, self._offset)
        if rows and rows.get("tokens"):
            self._offset = rows["text_offset"][-1] + len(rows["tokens"][-1])
        return rows


def _append(rows: Body, token: str, logprob: float | None, top: Body | None, first: int) -> None:
    """Append a token, which begins where the last one ended; the first one at `first`."""
    at = rows["text_offset"][-1] + len(rows["tokens"][-1]) if rows["tokens"] else first
    values = {"tokens": token, "token_logprobs": logprob, "top_logprobs": top, "text_offset": at}
    for name, value in values.items():
        rows[name].append(value)


def _entry(choice: Choice, spell: Callable[[int], str]) -> Body:
    """Return one token in the format of the chat API."""
    others = [_token(spell(i), p) for i, p in choice.likeliest]
    return {**_token(spell(choice.token), choice.logprob), "top_logprobs": others}


def _token(text: str, logprob: float) -> Body:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode(errors="replace"))}


def _finite(logprob: float) -> float | None:
    """Return a log-probability as JSON can hold it."""
    return logprob if isfinite(logprob) else None
