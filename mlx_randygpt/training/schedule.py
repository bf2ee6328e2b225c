"""Learning rates, as pure functions of the step."""

from __future__ import annotations

import math

TRAPEZOID_DECAY = 0.4  # the last fraction of the run, in which `trapezoid` decays
PLATEAU_FACTOR = 0.5


def is_due(step: int, every: int) -> bool:
    """Return whether an event that happens every `every` steps is due; 0 means never."""
    return every > 0 and step > 0 and step % every == 0


def decay_start(iters: int, warmup: int) -> int:
    """Return the step after which `trapezoid` decays; a run can be extended until then."""
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
    """Return the learning rate of the step that follows `step` finished ones.

    The rate warms up linearly to `lr`. Then `cosine` and `linear` decay to `min_lr` at `iters`,
    `trapezoid` stays at `lr` and decays linearly over the last 40 %, `constant` stays, and
    `plateau` is lr · 0.5^reductions, but at least min_lr. It is never zero on the first or last
    step.
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
