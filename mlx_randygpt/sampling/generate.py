"""Text generation: sequences that share one cache, one token at a time, on any backend.

`Streams` holds the sequences that the model reads; a `Continuation` is one text with its settings
and random numbers; `extend` gives each continuation its next token. A sequence does not depend on
its neighbours, so the same seed gives the same text alone, in a batch, and on every backend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mlx_randygpt.backends.base import Cache, Scorer
from mlx_randygpt.config import ConfigError, ModelConfig
from mlx_randygpt.sampling.filters import (
    SampleConfig,
    changes_logits,
    penalise,
    pick,
    probabilities,
)
from mlx_randygpt.state import Array, rng
from mlx_randygpt.tokenizers import Tokenizer, stops


class Streams:
    """Up to `max_rows` sequences that the model reads together, in rows 0 to n-1 of one cache.

    With rotary positions the window slides: each layer attends to the last `block_size` keys. With
    learned positions, the last half window of a full row is read again from position 0.
    """

    def __init__(self, backend: Scorer, model: ModelConfig, max_rows: int) -> None:
        self._backend, self._model = backend, model
        self._cache: Cache = backend.new_cache(max_rows)
        self._windows: list[deque[int]] = []  # the last half window of each

    def __len__(self) -> int:
        return len(self._windows)

    def join(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Read the last `block_size` tokens of each prompt in a new row; return logits (n, V)."""
        rows = slice(len(self), len(self) + len(prompts))
        half = max(1, self._model.block_size // 2)
        self._windows += [deque(prompt, half) for prompt in prompts]
        self._cache.reset(rows)
        latest = [prompt[-self._model.block_size :] for prompt in prompts]
        lengths = np.array([len(prompt) for prompt in latest])
        tokens = np.full((len(prompts), lengths.max()), latest[0][0], np.int32)
        for row, prompt in zip(tokens, latest, strict=True):
            row[: len(prompt)] = prompt
        return self._backend.logits(tokens, self._cache, rows, lengths)

    def append(self, tokens: Sequence[int]) -> Array:
        """Feed one token to every row; return the next logits, (n, V)."""
        if self._model.position == "learned":
            self._reread_full_rows()
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        new = np.array(tokens, np.int32)[:, None]  # (n, 1)
        return self._backend.logits(new, self._cache, slice(0, len(self)))

    def leave(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        last = self._windows.pop()
        if row < len(self):
            self._windows[row] = last
            self._cache.move(len(self), row)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; a row can be named twice."""
        self._cache.select(rows)
        self._windows = [self._windows[row].copy() for row in rows]

    def _reread_full_rows(self) -> None:
        """Let full rows read all but one token of their last half window; the newest comes next."""
        full = self._cache.lengths[: len(self)] == self._model.block_size
        edges = np.flatnonzero(np.diff(full, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2):  # a run of adjacent rows
            self._cache.reset(slice(start, stop))
            kept = np.array(self._windows[start:stop], np.int32)[:, 1:]
            if kept.size:
                self._backend.logits(kept, self._cache, slice(start, stop))


@dataclass(frozen=True)
class Choice:
    """A token and its alternatives, by the model alone, before any ban or filter.

    Tokens that generation never picks are not among the alternatives.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]  # (token, logprob), most likely first


@dataclass
class Generated:
    """One text as it grows."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = (
        ""  # "stop" (end of text or turn, or a stop text) | "length" | "" while growing
    )
    choices: list[Choice] = field(default_factory=list)  # if requested


class Continuation:
    """One text in progress: the settings and the random numbers that decide it.

    With `n_likely`, each token is recorded with that many likely alternatives. `forced` tokens are
    taken before any is drawn: a prompt is read token by token if its choices are requested.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        config: SampleConfig,
        index: int = 0,
        n_likely: int | None = None,
        forced: Sequence[int] = (),
    ) -> None:
        if not len(prompt):
            raise ConfigError("the prompt is empty; give at least one token")
        if outside := [i for i, _ in config.logit_bias if not 0 <= i < tokenizer.vocab_size]:
            last = tokenizer.vocab_size - 1
            raise ConfigError(f"logit_bias of token {outside[0]}: token ids are 0 to {last}")
        self.config, self.sample, self.prompt = config, Generated(), list(prompt)
        self.is_penalised = changes_logits(config)
        self._index = index
        self.n_likely, self.forced = n_likely, deque(forced)
        self._ends, self._spell = stops(tokenizer), tokenizer.decoder()
        self.banned = list(tokenizer.never_sampled())

    @cached_property
    def random(self) -> np.random.Generator:
        """The generator of this text; made with the first token, not while requests queue."""
        return rng(self.config.seed, "sample", self._index)

    def take(self, token: int) -> None:
        """Append a token; the text ends at the end-of-text token, a stop text or the limit."""
        if self.forced:
            self.prompt.append(self.forced.popleft())
            if not self.forced and self.config.max_tokens == 0:
                self.sample.finish_reason = "length"
            return
        self.grow(token, self._spell(token))

    def grow(self, token: int, piece: str) -> None:
        """Append a token whose text is `piece`."""
        sample, stops = self.sample, self.config.stop
        sample.ids.append(token)
        if token in self._ends:
            sample.finish_reason = "stop"
            return
        at = len(sample.text)
        sample.text += piece
        if stops and (
            ends := [
                end
                for stop in stops
                if (end := sample.text.find(stop, max(0, at - len(stop) + 1))) >= 0
            ]
        ):
            sample.text, sample.finish_reason = sample.text[: min(ends)], "stop"
        elif len(sample.ids) >= self.config.max_tokens:
            sample.finish_reason = "length"


def extend(texts: Sequence[Continuation], logits: Array) -> list[int]:
    """Draw the next token of each text from logits (n, V), append it, and return all of them."""
    scores = np.array(logits, np.float64)
    logprobs = {i: log_softmax(scores[i]) for i, w in enumerate(texts) if w.n_likely is not None}
    banned = texts[0].banned  # of one model, so of one tokenizer
    scores[:, banned] = -np.inf
    for i, text in enumerate(texts):
        if text.is_penalised:
            penalise(scores[i], text.config, text.prompt, text.sample.ids)
    p = probabilities(scores, [text.config for text in texts])
    draws = [0.0 if text.forced else text.random.random() for text in texts]
    tokens: list[int] = pick(p, np.array(draws)).tolist()
    for i, text in enumerate(texts):
        if text.forced:
            tokens[i] = text.forced[0]
        if i in logprobs:
            text.sample.choices.append(_choice(tokens[i], logprobs[i], text.n_likely or 0, banned))
        text.take(tokens[i])
    return tokens


def _choice(token: int, logprobs: Array, n: int, banned: Sequence[int]) -> Choice:
    best = np.argsort(-logprobs, kind="stable")[: n + len(banned)].tolist()
    never = set(banned)
    writable = [i for i in best if i not in never][:n]
    pairs = tuple((i, float(logprobs[i])) for i in writable)
    return Choice(token, float(logprobs[token]), pairs)


def log_softmax(scores: Array) -> Array:
    """Return log p along the last axis."""
    scores = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)))


def generate(  # noqa: PLR0913
    backend: Scorer,
    model: ModelConfig,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: SampleConfig,
    n_samples: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    n_likely: int | None = None,
) -> Iterator[list[Generated]]:
    """Continue `prompt` (at least one id) `n_samples` times in one batch, one token at a time.

    Yields the same list after each token. Sample i draws from the generator of (seed, i), so its
    text does not depend on its neighbours. A stop text ends a sample and is cut from its text.
    """
    growing = [Continuation(tokenizer, prompt, config, i, n_likely) for i in range(n_samples)]
    samples, streams = [text.sample for text in growing], Streams(backend, model, n_samples)
    if config.max_tokens == 0:
        yield samples
    tokens: list[int] = []
    while growing and config.max_tokens and not should_stop():
        logits = streams.append(tokens) if len(streams) else streams.join([prompt] * n_samples)
        tokens = extend(growing, logits)
        yield samples
        for row in reversed(range(len(growing))):
            if growing[row].sample.finish_reason:
                streams.leave(row)
                growing[row], tokens[row] = growing[-1], tokens[-1]
                del growing[-1], tokens[-1]
    for sample in samples:
        sample.finish_reason = sample.finish_reason or "length"


def shown_length(text: str, stops: Sequence[str]) -> int:
    """Return how many characters of a growing text can be shown.

    A possible beginning of a stop text is held back.
    """
    held = 0
    for stop in stops:
        begin = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while 0 <= begin < len(text) - held:
            if stop.startswith(text[begin:]):
                held = len(text) - begin
            begin = text.find(stop[0], begin + 1)
    return len(text) - held
