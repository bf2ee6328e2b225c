"""How hard a text is to predict, from the loss of an n-gram model that is counted in a moment."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.state import Array

ORDER = 4  # tokens before the one that is predicted, at most
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
Hashes = NDArray[np.uint64]


def ngram_loss(train: Array, test: Array, vocab_size: int) -> float:
    """Return the loss on token ids `test` (m,) of a model counted on `train` (n,), nats per token.

    The model is Witten and Bell's (1991): after a context that occurred c times, with d different
    tokens behind it, p(token) = (its count + d · p(token | context without its first token)) /
    (c + d). An unknown token has 1 / vocab_size. Both texts need more than ORDER tokens.
    """
    p = np.full(len(test) - ORDER, 1 / vocab_size)
    for length in range(ORDER + 1):
        context, gram = _hash(train, length, 0), _hash(train, length, 1)
        _, first = np.unique(gram, return_index=True)
        before, after = _hash(test, length, 0), _hash(test, length, 1)
        n_context, n_gram = _count(context, before), _count(gram, after)
        n_different = _count(context[first], before)
        mixed = (n_gram + n_different * p) / np.maximum(1, n_context + n_different)
        p = np.where(n_context > 0, mixed, p)
    return float(-np.log(p).mean())


def _hash(tokens: Array, length: int, more: int) -> Hashes:
    """Hash the `length` tokens before each position from ORDER on, and `more` tokens from there."""
    n = len(tokens) - ORDER
    hashes: Hashes = np.zeros(n, np.uint64)
    for start in range(ORDER - length, ORDER + more):
        hashes = (hashes + tokens[start : start + n].astype(np.uint64) + np.uint64(1)) * _MIX
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _count(hashes: Hashes, asked: Hashes) -> NDArray[np.int64]:
    """Return how often each of `asked` occurs in `hashes`."""
    known, counts = np.unique(hashes, return_counts=True)
    at = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return np.where(known[at] == asked, counts[at], 0)
