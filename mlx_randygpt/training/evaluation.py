"""Evaluation: the mean loss over a whole split, the same number every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlx_randygpt.backends.base import Scorer
from mlx_randygpt.data.windows import eval_batches
from mlx_randygpt.state import IGNORED, Array, Batch, Tokens
from mlx_randygpt.training.reports import perplexity

EVAL_BATCH_TOKENS = 4096  # minimum tokens in one batch of an evaluation
OVERFIT_EVALUATIONS = 3  # evaluations without a new best that count as overfitting if
OVERFIT_GAP = 0.05  # the validation loss also exceeds the training loss by this much (nats)


@dataclass(frozen=True)
class Score:
    """The loss over a whole split."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int  # targets counted

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return perplexity(self.loss)


def evaluate(
    backend: Scorer,
    tokens: Tokens,
    block_size: int,
    batch_size: int,
    token_bytes: Array,
    should_stop: Callable[[], bool] = lambda: False,
    max_tokens: int | None = None,
) -> Score | None:
    """Return the mean loss over non-overlapping windows of `tokens` (n,).

    Every token except the first is predicted once. `token_bytes` (V,) holds the length of each
    token in UTF-8. With `max_tokens`, only that many tokens' worth of windows are read, evenly
    spread. Returns None if `should_stop` returned true before the end.
    """
    batches = eval_batches(tokens, block_size, batch_size, max_tokens)
    return score_batches(backend, batches, token_bytes, should_stop)


def score_batches(
    backend: Scorer,
    batches: Iterable[Batch],
    token_bytes: Array,
    should_stop: Callable[[], bool] = lambda: False,
) -> Score | None:
    """Return the mean loss over all targets of `batches` that count, as `evaluate` does."""
    nats, n_targets, n_bytes = 0.0, 0, 0
    for batch in batches:
        if should_stop():
            return None
        count, targets = batch.n_targets(), batch.y()
        nats += backend.loss(batch) * count
        n_targets += count
        n_bytes += int(token_bytes[targets[targets != IGNORED]].sum())
    return Score(nats / n_targets, nats / math.log(2) / max(1, n_bytes), n_targets)


def overfitting(train_loss: float, val_loss: float, waited: int, best_step: int) -> str:
    """Return a one-line warning if the model overfits, else "".

    It does if the validation loss has not improved for `waited` evaluations while the training
    loss lies well below it.
    """
    if waited < OVERFIT_EVALUATIONS or not val_loss > train_loss + OVERFIT_GAP:
        return ""
    return (
        f"Overfitting: training loss {train_loss:.3f}, validation loss {val_loss:.3f}, no new best "
        f"since step {best_step}. Try more text or --dropout."
    )
