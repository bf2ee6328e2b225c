"""What a run decides from its sizes where the user has not: warmup and dropout.

Pure functions of numbers; the runs that earned each constant are in docs/recipes.md.
"""

from __future__ import annotations

from mlx_randygpt.config import ModelConfig, TrainConfig


def warmup_steps(longest: int, iters: int) -> int:
    """Steps of warmup: the recipe's, but at most a tenth of the run."""
    return min(longest, iters // 10)


def passes(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """How often the run reads each of its `n_tokens` training tokens."""
    return train.iters * train.sequences_per_step * model.block_size / n_tokens


def dropout(model: ModelConfig, train: TrainConfig, n_tokens: int) -> float:
    """Dropout for a text of so many training tokens (0: not known, no dropout)."""
    return 0.0
