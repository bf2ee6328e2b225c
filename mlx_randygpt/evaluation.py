"""What a model's loss is on a whole split: one number, the same every time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mlx_randygpt.backends.base import Backend
from mlx_randygpt.data.windows import eval_batches
from mlx_randygpt.state import IGNORED, Array


@dataclass(frozen=True)
class Score:
    """A score over a whole split."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int  # targets counted

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(
    backend: Backend,
    tokens: Array,
    block_size: int,
    batch_size: int,
    token_bytes: Array,
    should_stop: Callable[[], bool] = lambda: False,
    max_tokens: int | None = None,
) -> Score | None:
    """Mean loss over non-overlapping windows of `tokens`, each token but the first predicted once.

    The same number every time. None where `should_stop` turned true before the end; with
    `max_tokens`, that many tokens' worth of windows, evenly spread.
    """
    nats, n_targets, n_bytes = 0.0, 0, 0
    for batch in eval_batches(tokens, block_size, batch_size, max_tokens):
        if should_stop():
            return None
        count, targets = batch.n_targets(), batch.y()
        nats += backend.loss(batch) * count
        n_targets += count
        n_bytes += int(token_bytes[targets[targets != IGNORED]].sum())
    return Score(nats / n_targets, nats / math.log(2) / max(1, n_bytes), n_targets)
