"""Estimate how hard a text is to predict, from the loss of an n-gram model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data.hashing import hash_windows
from mlx_randygpt.state import Array

ORDER = 4  # tokens before the one that is predicted, at most
Hashes = NDArray[np.uint64]


def ngram_loss(train: Array, test: Array, vocab_size: int) -> float:
    """Return the loss on token ids `test` (m,) of a model counted on `train` (n,), nats per token.

    The model is Witten and Bell's (1991): after a context that occurred c times, with d different
    tokens behind it, p(token) = (its count + d · p(token | context without its first token)) /
    (c + d). An unknown token has 1 / vocab_size. Both texts need more than ORDER tokens.
    """
    p = np.full(len(test) - ORDER, 1 / vocab_size)
    for length in range(ORDER + 1):
        contexts, grams = _hash(train, length)
        asked_contexts, asked_grams = _hash(test, length)
        _, first = np.unique(grams, return_index=True)
        n_context = _count(contexts, asked_contexts)
        n_different = _count(contexts[first], asked_contexts)
        n_gram = _count(grams, asked_grams)
        mixed = (n_gram + n_different * p) / np.maximum(1, n_context + n_different)
        p = np.where(n_context > 0, mixed, p)
    return float(-np.log(p).mean())


def _hash(tokens: Array, length: int) -> tuple[Hashes, Hashes]:
    """Hash the `length` tokens before each position from ORDER on, without and with its token."""
    ids = tokens[ORDER - length :].astype(np.uint64)
    grams = hash_windows(ids, length + 1)
    return hash_windows(ids[:-1], length) if length else np.zeros_like(grams), grams


def _count(hashes: Hashes, asked: Hashes) -> NDArray[np.int64]:
    """Return how often each of `asked` occurs in `hashes`."""
    known, counts = np.unique(hashes, return_counts=True)
    at = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return np.where(known[at] == asked, counts[at], 0)
