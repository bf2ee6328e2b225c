"""Learning rates as pure functions of the step, and the plateau rule as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

TRAPEZOID_DECAY = 0.4  # the last part of the run, in which `trapezoid` decays
PLATEAU_FACTOR = 0.5
MAX_REDUCTIONS = 3


@dataclass(frozen=True)
class Plateau:
    """How long the validation loss has not improved, and how often the rate was halved for it."""

    best_loss: float = math.inf
    evaluations_without_best: int = 0
    reductions: int = 0

    def observe(self, val_loss: float, patience: int, schedule: str) -> Plateau:
        """The state after one more evaluation; under `plateau`, `patience` evaluations without a
        new best halve the rate, at most MAX_REDUCTIONS times."""
        if val_loss < self.best_loss:
            return replace(self, best_loss=val_loss, evaluations_without_best=0)
        waited = self.evaluations_without_best + 1
        if schedule == "plateau" and waited >= patience > 0 and self.reductions < MAX_REDUCTIONS:
            return replace(self, evaluations_without_best=0, reductions=self.reductions + 1)
        return replace(self, evaluations_without_best=waited)

    def exhausted(self, patience: int) -> bool:
        """Whether to stop early: patience is over and the rate will not be halved again."""
        return 0 < patience <= self.evaluations_without_best


def is_due(step: int, every: int) -> bool:
    """Whether what happens every so many steps happens after this one; 0 is never."""
    return every > 0 and step > 0 and step % every == 0


def decay_start(iters: int, warmup: int) -> int:
    """The step after which `trapezoid` decays; a run that went no further can be extended."""
    return max(warmup, iters - round(TRAPEZOID_DECAY * iters))


def learning_rate(
    step: int,
    *,
    iters: int,
    warmup: int,
    lr: float,
    min_lr: float,
    schedule: str,
    reductions: int = 0,
) -> float:
    """Rate of the step that follows `step` finished ones; never zero on the first or last step.

    A linear warmup to `lr`, then by name: `cosine` and `linear` decay to `min_lr` at `iters`,
    `trapezoid` stays at `lr` and decays linearly over the last 40 %, `constant` stays,
    `plateau` is lr · 0.5^reductions, at least min_lr.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    if schedule == "plateau":
        return max(lr * PLATEAU_FACTOR**reductions, min_lr)
    start = decay_start(iters, warmup) if schedule == "trapezoid" else warmup
    done = max(0.0, (step - start) / max(1, iters - start))
    left = 1 - done if schedule != "cosine" else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + (lr - min_lr) * left
