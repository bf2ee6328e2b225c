"""Decoding: which token comes next, and when to stop. One set of rules for every backend.

Filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p; what is left
is renormalised and drawn from. All of it runs in float64 NumPy on the host, so that the same
seed gives the same text on each backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_randygpt.backends.base import ALL, Backend, Cache
from mlx_randygpt.config import ConfigError, ModelConfig
from mlx_randygpt.state import Array, rng
from mlx_randygpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """How to pick; the defaults are the command's."""

    max_tokens: int = 200
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 0.9  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off
    seed: int = 1337
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name}={value} is negative; it must be at least 0")
        for name, low, high in (
            ("temperature", 0.0, 1e3), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-3, 1e3),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}={value} is not in [{low:g}, {high:g}]")
        if "" in self.stop:
            raise ConfigError("stop='' would stop before the first token; give a text")


def probabilities(logits: Array, config: SampleConfig, seen: Sequence[int] = ()) -> Array:
    """What `pick` draws from: (V,) float64, summing to 1. `seen` are the ids to be penalised."""
    scores = np.array(logits, np.float64)
    if config.repetition_penalty != 1 and len(seen):
        ids = np.unique(np.asarray(seen))
        penalty = config.repetition_penalty  # Keskar et al. 2019, arXiv:1909.05858
        scores[ids] = np.where(scores[ids] > 0, scores[ids] / penalty, scores[ids] * penalty)
    if config.temperature == 0:
        return np.asarray(np.arange(len(scores)) == scores.argmax(), np.float64)
    scores -= scores.max()
    with np.errstate(over="ignore"):  # a tiny temperature leaves the likeliest alone
        scores /= config.temperature
    if 0 < config.top_k < len(scores):
        scores[scores < np.partition(scores, -config.top_k)[-config.top_k]] = -np.inf
    p = _normalised(np.exp(scores))
    if config.top_p < 1:
        p = _normalised(np.where(_nucleus(p, config.top_p), p, 0))
    if config.min_p > 0:
        p = _normalised(np.where(p >= config.min_p * p.max(), p, 0))
    return p


def pick(p: Array, random: np.random.Generator) -> int:
    """One draw from p (V,), by inverting the cumulative sum."""
    at = np.searchsorted(np.cumsum(p), random.random(), side="right")
    return int(min(at, np.flatnonzero(p)[-1]))


def _nucleus(p: Array, top_p: float) -> Array:
    """The fewest most likely tokens whose sum reaches top_p (Holtzman et al. 2020), at least one:
    a token stays while what is ahead of it sums to less than top_p. Ties go to the lower id."""
    order = np.argsort(-p, kind="stable")
    ahead = np.cumsum(p[order]) - p[order]
    keep = np.zeros(len(p), bool)
    keep[order] = ahead < top_p
    keep[order[0]] = True
    return keep


def _normalised(p: Array) -> Array:
    return np.asarray(p / p.sum())


class Stream:
    """The cache of B streams and the rule for what the model sees past its context.

    Rotary positions: the window slides, each layer attending to the last `block_size` keys.
    Learned positions: when the cache is full, the last half window is read again from position 0.
    """

    def __init__(self, backend: Backend, model: ModelConfig, prompts: Array) -> None:
        self._backend, self._model = backend, model
        self._tokens = np.asarray(prompts, np.int32)[:, -model.block_size :]  # (B, T)
        self.cache: Cache = backend.new_cache(len(prompts))
        self.logits = backend.logits(self._tokens, self.cache)  # (B, V)

    def append(self, tokens: Sequence[int]) -> None:
        """Let every stream read one more token; `logits` is then what follows it."""
        new = np.asarray(tokens, np.int32)[:, None]  # (B, 1)
        self._tokens = np.concatenate([self._tokens, new], axis=1)[:, -self._model.block_size :]
        if self._model.position == "learned" and self.cache.lengths[0] == self._model.block_size:
            self.cache.reset(ALL)
            new = self._tokens[:, -max(1, self._model.block_size // 2) :]
        self.logits = self._backend.logits(new, self.cache)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these streams, in this order; a row may be named twice."""
        self.cache.select(rows)
        self._tokens, self.logits = self._tokens[list(rows)], self.logits[list(rows)]


@dataclass
class Generated:
    """One stream's text as it grows."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""  # "stop" (end of text or a stop text) | "length" | "" while growing


def generate(
    backend: Backend,
    model: ModelConfig,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: SampleConfig,
    n_samples: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[Generated]]:
    """Continue `prompt` (at least one id) `n_samples` times in one batch, a token at a time.

    Yields the same list after each token. Sample i draws from the generator of (seed, i), so it
    reads the same whatever its neighbours. A stop text ends a sample and is cut from its text.
    Half a character at the end is left out.
    """
    if not len(prompt):
        raise ConfigError("the prompt is empty; give at least one token")
    samples = [Generated() for _ in range(n_samples)]
    if config.max_tokens == 0:
        yield samples
    randoms = [rng(config.seed, "sample", i) for i in range(n_samples)]
    decoders = [tokenizer.decoder() for _ in samples]
    banned = list(tokenizer.never_sampled())
    stream = Stream(backend, model, np.tile(np.asarray(prompt, np.int32), (n_samples, 1)))
    for n in range(config.max_tokens):
        if should_stop():
            break
        if n:
            stream.append([s.ids[-1] for s in samples])
        rows = zip(samples, randoms, decoders, stream.logits, strict=True)
        for sample, random, decoder, logits in rows:
            if sample.finish_reason:
                continue  # reads its last token again, to keep the batch in step
            logits[banned] = -np.inf
            seen = [*prompt, *sample.ids] if config.repetition_penalty != 1 else ()
            token = pick(probabilities(logits, config, seen), random)
            _extend(sample, token, sample.text + decoder(token), tokenizer.eos, config)
        yield samples
        if all(sample.finish_reason for sample in samples):
            break
    for sample in samples:
        sample.finish_reason = sample.finish_reason or "length"


def _extend(sample: Generated, token: int, text: str, eos: int, config: SampleConfig) -> None:
    sample.ids.append(token)
    sample.text = text
    if token == eos:
        sample.finish_reason = "stop"
        return
    ends = [at for stop in config.stop if (at := sample.text.find(stop)) >= 0]
    if ends:
        sample.text = sample.text[: min(ends)]
        sample.finish_reason = "stop"


def beam_search(
    backend: Backend,
    model: ModelConfig,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: SampleConfig,
    n_beams: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generated:
    """The continuation of highest mean log-probability per token among `n_beams` kept at a time.

    Nothing is drawn: of the sampling settings only max_tokens and stop apply.
    """
    stream = Stream(backend, model, np.asarray([prompt], np.int32))
    beams, scores, ended = [Generated()], np.zeros(1), list[tuple[float, Generated]]()
    banned = list(tokenizer.never_sampled())
    for n in range(config.max_tokens):
        if should_stop():
            break
        total = scores[:, None] + _log_softmax(stream.logits, banned)  # (K, V)
        best = np.argsort(-total, axis=None, kind="stable")[: 2 * n_beams]
        rows, growing, kept = [], list[Generated](), list[float]()
        for row, token in zip(*np.unravel_index(best, total.shape), strict=True):
            beam = Generated(list(beams[row].ids))
            text = tokenizer.decode([*beam.ids, int(token)])
            _extend(beam, int(token), text, tokenizer.eos, config)
            if beam.finish_reason:
                ended.append((float(total[row, token]) / (n + 1), beam))
            elif len(growing) < n_beams:
                rows.append(int(row))
                growing.append(beam)
                kept.append(float(total[row, token]))
        beams, scores = growing, np.array(kept)
        if len(ended) >= n_beams or not beams or n + 1 == config.max_tokens:
            break
        stream.select(rows)
        stream.append([beam.ids[-1] for beam in beams])
    for score, beam in zip(scores, beams, strict=True):
        beam.finish_reason = "length"
        ended.append((float(score) / max(1, len(beam.ids)), beam))
    return max(ended, key=lambda pair: pair[0])[1]


def _log_softmax(logits: Array, banned: Sequence[int]) -> Array:
    scores = np.array(logits, np.float64)
    scores[:, list(banned)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)))


def unambiguous(text: str, stops: Sequence[str]) -> int:
    """How much of a growing text can be shown: what might be the start of a stop text waits."""
    for n in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return len(text) - n
    return len(text)
