"""The step at which a run that is limited by `minutes` has to end."""

from __future__ import annotations

from collections.abc import Callable

from mlx_randygpt.config import TrainConfig

FIRST_SHARE = 0.05  # of the time, after which the pace is known well enough to move the target
SHARE = 0.01  # of the time, between later moves


class TimeLimit:
    """The target of a run that ends by the clock, at the pace of this session.

    Evaluations, samples and saves count as a part of the steps they come between. Without
    `train.minutes` the target is `train.iters`.
    """

    def __init__(self, train: TrainConfig, clock: Callable[[], float], started: float) -> None:
        self.closing_seconds = 0.0  # from the last step to the end of the run
        self._clock, self._seconds = clock, 60 * train.minutes
        self._iters, self._ends_at = train.iters, started + self._seconds
        self._first: tuple[int, float] | None = None  # step and time of the first call
        self._due_at = 0.0

    def target(self, step: int) -> int:
        """Return the step to train to; call it after each step."""
        now = self._clock()
        if not self._seconds:
            return self._iters
        if self._first is None:  # compiling comes before it
            self._first = step, now
            self._due_at = min(now + FIRST_SHARE * self._seconds, self._ends_at)
        first, began = self._first
        is_due = now >= self._due_at or step + 1 >= self._iters
        if is_due and step > first:
            pace = (step - first) / max(now - began, 1e-9)
            seconds = self._ends_at - self.closing_seconds - now
            self._iters = step + max(1, int(seconds * pace))
            self._due_at = now + SHARE * self._seconds
        return self._iters
