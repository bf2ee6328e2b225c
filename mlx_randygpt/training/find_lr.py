"""The learning-rate range test: a short run whose rate grows from step to step.

A rate that is too small learns nothing, and one that is too large destroys what was learned; in
between, the loss falls fastest (Smith 2017, arXiv:1506.01186).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_randygpt.backends.base import Backend
from mlx_randygpt.state import Batch

SMOOTHING = 0.15  # weight of the newest loss
TOO_HIGH = 1.3  # stop when the smoothed loss exceeds its minimum by this factor
NOISE = 3.0  # factor between rates that a range test of a hundred steps does not tell apart
BACK_OFF = 0.3  # suggested rate over the rate at the minimum: a run stays there longer


@dataclass(frozen=True)
class Trial:
    """One step of the range test."""

    lr: float
    loss: float  # smoothed and bias-corrected; nan if it was not finite


def range_test(
    backend: Backend, batches: Sequence[Batch], *, lowest: float, highest: float
) -> Iterator[Trial]:
    """Train at rates from `lowest` to `highest`, evenly spaced by ratio; yield a step per batch.

    The test ends early when the loss clearly rises. It changes the weights of `backend`.
    """
    average, weight, best = 0.0, 0.0, math.inf
    for step, batch in enumerate(batches):
        lr = lowest * (highest / lowest) ** (step / max(1, len(batches) - 1))
        loss = backend.train_step([batch], lr).loss
        average = (1 - SMOOTHING) * average + SMOOTHING * loss
        weight = (1 - SMOOTHING) * weight + SMOOTHING
        smooth = average / weight
        yield Trial(lr, smooth)
        best = min(best, smooth)
        if not smooth <= TOO_HIGH * best:
            return


def suggest(trials: list[Trial]) -> float:
    """Return the rate at the lowest smoothed loss, reduced by BACK_OFF for safety."""
    finite = [trial for trial in trials if math.isfinite(trial.loss)]
    return BACK_OFF * min(finite, key=lambda trial: trial.loss).lr


def is_worth_trying(suggestion: float, rule: float) -> bool:
    """Return whether a suggested rate differs from the rule's by more than the test can tell.

    Between half and twice the rule's rate, runs of 150 to 600 steps ended within about 0.02 of each
    other (docs/recipes.md), so a suggestion close to the rule says nothing.
    """
    return not rule / NOISE <= suggestion <= rule * NOISE
