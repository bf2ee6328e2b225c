"""What a model's loss is on a whole split: one number, the same every time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mlx_randygpt.backends.base import Scorer
from mlx_randygpt.data.windows import eval_batches
from mlx_randygpt.state import IGNORED, Array

OVERFIT_EVALUATIONS = 3  # without a new best, and
OVERFIT_GAP = 0.05  # nats of validation over training loss: the model learns its text by heart


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
    backend: Scorer,
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


def overfitting(train_loss: float, val_loss: float, waited: int, best_step: int) -> str:
    """One line where validation loss has not improved for some evaluations while the training
    loss lies well below it; else ""."""
    if waited < OVERFIT_EVALUATIONS or not val_loss > train_loss + OVERFIT_GAP:
        return ""
    return (
        f"Overfitting: training loss {train_loss:.3f}, validation loss {val_loss:.3f}, no new best "
        f"since step {best_step}. More text helps most, then --dropout; --patience stops early. "
        "The best checkpoint is kept."
    )
