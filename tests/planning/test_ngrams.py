"""The n-gram model counts what a definition with dictionaries counts."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from mlx_randygpt.planning.ngrams import ORDER, ngram_loss


def naive_loss(train: list[int], test: list[int], vocab_size: int) -> float:
    """Compute the loss from the definition of Witten and Bell's model, token by token."""
    grams = [
        Counter(tuple(train[i - n : i + 1]) for i in range(ORDER, len(train)))
        for n in range(ORDER + 1)
    ]

    def probability(context: tuple[int, ...], token: int, n: int) -> float:
        if n < 0:
            return 1 / vocab_size
        shorter = probability(context[1:], token, n - 1)
        follows = {gram[-1]: c for gram, c in grams[n].items() if gram[:-1] == context}
        if not follows:
            return shorter
        total = sum(follows.values()) + len(follows)
        return (follows.get(token, 0) + len(follows) * shorter) / total

    losses = [
        -math.log(probability(tuple(test[i - ORDER : i]), test[i], ORDER))
        for i in range(ORDER, len(test))
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_that_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    train, test = (random.choice(4, size=n, p=[0.6, 0.2, 0.15, 0.05]) for n in (80, 30))
    expected = naive_loss(train.tolist(), test.tolist(), 7)
    assert ngram_loss(train, test, 7) == pytest.approx(expected, rel=1e-12)


def test_random_tokens_cost_more_than_their_entropy_and_repetitions_nothing() -> None:
    random = np.random.default_rng(1)
    train, test = random.integers(8, size=50_000), random.integers(8, size=5000)
    assert math.log(8) < ngram_loss(train, test, 8) < 1.15 * math.log(8)
    cycle = np.arange(8000) % 8
    assert ngram_loss(cycle, cycle[:100], 8) < 0.01
