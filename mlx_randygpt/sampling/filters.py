"""From logits to the next token: penalties, temperature, filters and the draw.

The order is logit bias, repetition penalty, presence and frequency penalty, temperature, top-k,
top-p, min-p, typical; the distribution is renormalised after each filter. All functions work on
many sequences at once, each with its own settings, in float64 on the host: a sequence gets the
same tokens alone or in a batch, and on every backend. Sources: docs/sampling.md.

Legend: N sequences, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import NamedTuple

import numpy as np

from mlx_randygpt.config import ConfigError, UserError
from mlx_randygpt.state import Array
from mlx_randygpt.words import unify_newlines

CACHED_VALUES = 1 << 15  # logits at a time, whose passes find them in a core's cache
WIDE_VOCAB = 1 << 14  # with more tokens than this, only the likely ones are sorted
RANGES = {  # the valid values of each setting
    "temperature": (0, 1e3), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3), "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}  # fmt: skip


class LogitsError(UserError, ValueError):
    """Logits that are nan, or minus infinity everywhere: the weights are damaged."""


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is chosen; the defaults are those of `mlxgpt sample`."""

    max_tokens: int = 200
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 0.9  # 1 is off
    min_p: float = 0.0  # 0 is off
    typical_p: float = 1.0  # 1 is off
    repetition_penalty: float = 1.0  # 1 is off; counts prompt and text
    presence_penalty: float = 0.0  # 0 is off; counts the text only
    frequency_penalty: float = 0.0  # 0 is off; counts the text only
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, value added to its logit)
    seed: int = 1337
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(map(unify_newlines, self.stop)))
        for name in ("max_tokens", "top_k", "seed"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name}={value} is negative; it must be at least 0")
        for name, (low, high) in RANGES.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name}={value} is not in [{low:g}, {high:g}]")
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise ConfigError(f"logit_bias of token {token}: {bias} is not in [-100, 100]")
        if "" in self.stop:
            raise ConfigError("stop='' would stop before the first token; give a text")

    def __hash__(self) -> int:
        """Hash a few fields only: this runs once per token and sequence."""
        return hash((self.seed, self.temperature, self.top_p))


def changes_logits(config: SampleConfig) -> bool:
    """Return whether this configuration penalises any token."""
    penalties = config.presence_penalty, config.frequency_penalty
    return bool(config.logit_bias or config.repetition_penalty != 1 or any(penalties))


def penalise(
    scores: Array, config: SampleConfig, prompt: Sequence[int], ids: Sequence[int]
) -> None:
    """Apply bias and penalties to the logits (V,) of one sequence, in place.

    `ids` holds the generated tokens so far.
    """
    for token, bias in config.logit_bias:
        scores[token] += bias
    if (penalty := config.repetition_penalty) != 1 and (len(prompt) or len(ids)):
        seen = np.unique([*prompt, *ids])  # Keskar et al. 2019, arXiv:1909.05858
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    if (config.presence_penalty or config.frequency_penalty) and len(ids):
        counts = np.bincount(ids, minlength=len(scores))  # (V,)
        scores -= config.frequency_penalty * counts + config.presence_penalty * (counts > 0)


def probabilities(scores: Array, configs: Sequence[SampleConfig]) -> Array:
    """Return the filtered distributions, (N, V) float64, of penalised logits (N, V).

    Each row sums to 1. Raises LogitsError if a row has a nan or no finite value.
    """
    n = max(1, CACHED_VALUES // scores.shape[1])
    if len(scores) > n:
        starts = range(0, len(scores), n)
        return np.concatenate(
            [probabilities(scores[i : i + n], configs[i : i + n]) for i in starts]
        )
    columns = _columns(tuple(configs))
    scores = np.array(scores, np.float64)
    best = scores.max(axis=-1, keepdims=True)
    if not isfinite(best.sum()):
        broken = best[~np.isfinite(best)][0]
        raise LogitsError(f"the model's largest logit is {broken}; its weights are damaged")
    scores -= best
    with np.errstate(over="ignore"):  # a tiny temperature leaves only the likeliest
        scores /= columns.temperature
    p = _normalise(np.exp(scores))
    for keep, on, value in columns.filters:
        part = p[on]  # a view if all sequences use the filter
        p[on] = _normalise(part * keep(part, value))
    if columns.greedy.size:
        first = scores[columns.greedy].argmax(axis=-1)
        p[columns.greedy] = 0
        p[columns.greedy, first] = 1
    return p


def pick(p: Array, draws: Array) -> Array:
    """Return the token at each draw in [0, 1), (N,), from the cumulative sums of p (N, V)."""
    sums, draws = np.cumsum(p, axis=-1), np.asarray(draws)[:, None]
    at = (sums > draws).argmax(axis=-1)
    for row in (sums[:, -1] <= draws[:, 0]).nonzero()[0]:  # rounding left a sum below 1
        at[row] = np.flatnonzero(p[row])[-1]
    return np.asarray(at)


def _top_k(p: Array, k: Array) -> Array:
    """Keep the k likeliest tokens and all ties with the last of them (Fan et al. 2018)."""
    at = p.shape[1] - np.clip(k, 1, p.shape[1]).astype(int)
    return np.asarray(p >= np.take_along_axis(np.partition(p, at[:, 0]), at, axis=-1))


def _top_p(p: Array, top_p: Array) -> Array:
    """Keep the fewest likely tokens whose sum reaches top_p, at least one (Holtzman et al. 2020).

    A token stays if the tokens ahead of it sum to less than top_p. Ties go to the lower id.
    """
    ordered = _descending(p, (1 - top_p) / p.shape[1])
    ahead = np.cumsum(ordered, axis=-1) - ordered
    ahead[:, 0] = -1
    beyond, rows, width = ahead >= top_p, np.arange(len(p)), ordered.shape[1]
    n = beyond.argmax(axis=-1)  # (N,)
    n[~beyond[:, -1]] = width
    least = ordered[rows, n - 1]  # (N,), of those that are kept
    kept = p >= least[:, None]
    tied = (n < width) & (ordered[rows, np.minimum(n, width - 1)] == least)
    for row in tied.nonzero()[0]:  # more are as likely as the last
        ties = np.flatnonzero(p[row] == least[row])
        kept[row, ties[n[row] - (p[row] > least[row]).sum() :]] = False
    return np.asarray(kept)


def _descending(p: Array, rare: Array) -> Array:
    """Return each row's values from the largest on, (N, n), n ≤ V.

    In a wide vocabulary those that are `rare` (N, 1) in all rows are left out: together they sum to
    less than what top-p drops.
    """
    if p.shape[1] > WIDE_VOCAB:
        p = p[:, (p >= rare / 2).any(axis=0)]  # half, because sums are rounded
    return np.sort(p, axis=-1)[:, ::-1]


def _min_p(p: Array, min_p: Array) -> Array:
    """Keep tokens with at least min_p times the highest probability (Nguyen et al. 2024)."""
    return np.asarray(p >= min_p * p.max(axis=-1, keepdims=True))


def _typical(p: Array, typical_p: Array) -> Array:
    """Keep the fewest tokens whose sum reaches typical_p (Meister et al. 2023).

    They are taken in order of the distance between −log p and the entropy of p.
    """
    nll = -np.log(np.where(p > 0, p, 1))
    entropy = (p * nll).sum(axis=-1, keepdims=True)
    distance = np.where(p > 0, np.abs(nll - entropy), np.inf)
    order = np.argsort(distance, axis=-1, kind="stable")
    ordered = np.take_along_axis(p, order, axis=-1)
    keep = np.cumsum(ordered, axis=-1) - ordered < typical_p
    keep[:, 0] = True
    kept: Array = np.empty_like(keep)
    np.put_along_axis(kept, order, keep, axis=-1)
    return kept


FILTERS = (  # setting, the value that turns it off, keep(p (N, V), values (N, 1)) -> (N, V) bool
    ("top_k", 0, _top_k), ("top_p", 1, _top_p), ("min_p", 0, _min_p), ("typical_p", 1, _typical),
)  # fmt: skip


class Columns(NamedTuple):
    """The settings of N sequences, arranged by column."""

    temperature: Array  # (N, 1), 1 for greedy sequences
    greedy: Array  # indices of the sequences at temperature 0
    filters: list[tuple[Callable[[Array, Array], Array], Array | slice, Array]]
    # each active filter: its function, the sequences that use it, their values (n, 1)


@lru_cache(maxsize=64)
def _columns(configs: tuple[SampleConfig, ...]) -> Columns:
    temperature = _column(configs, "temperature")
    filters: list[tuple[Callable[[Array, Array], Array], Array | slice, Array]] = []
    for name, off, keep in FILTERS:
        value = _column(configs, name)
        on = (value != off)[:, 0]
        if on.any():
            filters.append((keep, slice(None) if on.all() else on, value[on]))
    greedy = np.flatnonzero(temperature == 0)
    return Columns(np.where(temperature > 0, temperature, 1), greedy, filters)


def _column(configs: Sequence[SampleConfig], name: str) -> Array:
    return np.array([[getattr(config, name)] for config in configs], np.float64)  # (N, 1)


def _normalise(p: Array) -> Array:
    return np.asarray(p / p.sum(axis=-1, keepdims=True))
