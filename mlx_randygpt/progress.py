"""The progress of a run: counts, losses, and the plateau rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

MAX_REDUCTIONS = 3


@dataclass(frozen=True)
class Plateau:
    """Evaluations since the last best loss, and how often the learning rate was halved."""

    best_loss: float = math.inf
    evaluations_without_best: int = 0
    reductions: int = 0

    def observe(self, val_loss: float, patience: int, schedule: str) -> Plateau:
        """Return the state after one more evaluation.

        Under the schedule `plateau`, `patience` evaluations without a new best loss halve the
        learning rate, at most MAX_REDUCTIONS times.
        """
        if val_loss < self.best_loss:
            return replace(self, best_loss=val_loss, evaluations_without_best=0)
        n_without = self.evaluations_without_best + 1
        if schedule == "plateau" and n_without >= patience > 0 and self.reductions < MAX_REDUCTIONS:
            return replace(self, evaluations_without_best=0, reductions=self.reductions + 1)
        return replace(self, evaluations_without_best=n_without)

    def exhausted(self, patience: int) -> bool:
        """Return whether to stop early: `patience` evaluations brought no new best loss."""
        return 0 < patience <= self.evaluations_without_best


@dataclass(frozen=True)
class Progress:
    """The counts and losses of a run."""

    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # spent training so far
    best_loss: float = math.inf  # lowest validation loss, and its step
    best_step: int = 0
    val_loss: float = math.nan  # of the last evaluation, and its step
    eval_step: int = -1
    plateau: Plateau = field(default_factory=Plateau)
    rollbacks: int = 0  # by --on-nan; each halved the learning rate
    bits_per_byte: float = math.nan  # of the last evaluation
    generation: int = 0  # higher than that of all checkpoints that the run went back behind
