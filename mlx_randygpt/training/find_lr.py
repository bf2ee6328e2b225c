"""The range test of learning rates: a short run whose rate grows from step to step.

Too small a rate learns nothing, too large a one undoes what was learned; between them the loss
falls fastest (Smith 2017, arXiv:1506.01186).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_randygpt.backends.base import Backend
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.windows import sample_batch
from mlx_randygpt.state import Array

SMOOTHING = 0.15  # weight of the newest loss
TOO_HIGH = 1.3  # times the lowest smoothed loss: the test has seen enough
BACK_OFF = 0.3  # of the rate at the lowest loss: a whole run spends longer there than one step


@dataclass(frozen=True)
class Trial:
    """One step of the test."""

    lr: float
    loss: float  # smoothed, bias-corrected; nan where it was not finite


def range_test(
    backend: Backend,
    model: ModelConfig,
    train: TrainConfig,
    tokens: Array,
    lowest: float,
    highest: float,
    steps: int,
) -> Iterator[Trial]:
    """Train from fresh weights at rates from `lowest` to `highest`, evenly spaced by ratio; ends
    early where the loss has clearly turned."""
    average, weight, best = 0.0, 0.0, math.inf
    for step in range(steps):
        lr = lowest * (highest / lowest) ** (step / max(1, steps - 1))
        batch = sample_batch(tokens, train.batch_size, model.block_size, train.seed, step)
        loss = backend.train_step([batch], lr).loss
        average = (1 - SMOOTHING) * average + SMOOTHING * loss
        weight = (1 - SMOOTHING) * weight + SMOOTHING
        smooth = average / weight
        yield Trial(lr, smooth)
        best = min(best, smooth)
        if not smooth <= TOO_HIGH * best:
            return


def suggest(trials: list[Trial]) -> float:
    """The rate at the lowest smoothed loss, with some distance from the edge."""
    finite = [trial for trial in trials if math.isfinite(trial.loss)]
    return BACK_OFF * min(finite, key=lambda trial: trial.loss).lr
