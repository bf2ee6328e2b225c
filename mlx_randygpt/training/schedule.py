"""Learning rates as pure functions of the step, and the plateau rule as plain data."""

from __future__ import annotations

import math

TRAPEZOID_DECAY = 0.4  # the last part of the run, in which `trapezoid` decays
PLATEAU_FACTOR = 0.5


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
