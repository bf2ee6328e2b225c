"""The reports of a run: frozen records of plain numbers and texts, and its recent speed.

`train` yields them; screens, logs and tests read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepLog:
    """One optimizer step."""

    step: int  # steps taken so far, including this one
    loss: float  # mean over the step's tokens, nats
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # trained on so far, including earlier sessions
    tokens_per_second: float  # recent, excluding evaluations
    seconds: float  # spent training so far, including earlier sessions
    memory_bytes: int
    bits_per_byte: float = math.nan  # the loss divided by the bytes of the targets


@dataclass(frozen=True)
class EvalLog:
    """One evaluation on the validation split."""

    step: int
    val_loss: float  # nats per token
    bits_per_byte: float
    best_loss: float  # of the run, including this evaluation
    best_step: int
    seconds: float  # spent training so far, including earlier sessions

    @property
    def perplexity(self) -> float:
        """Return exp(val_loss)."""
        return perplexity(self.val_loss)


@dataclass(frozen=True)
class SampleLog:
    """A generated text; `text` does not include `prompt`."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class EarlyEvalLog:
    """A validation loss ahead of the first regular one; it is only shown."""

    step: int
    val_loss: float  # nats per token
    bits_per_byte: float
    tokens: int  # targets counted, evenly spread over the validation split
    next_seconds: float  # to the next early one

    @property
    def perplexity(self) -> float:
        """Return exp(val_loss)."""
        return perplexity(self.val_loss)


@dataclass(frozen=True)
class EarlySampleLog:
    """A text ahead of the first regular sample; it is only shown."""

    step: int
    prompt: str
    text: str
    next_seconds: float  # to the next early one


@dataclass(frozen=True)
class SaveLog:
    """A checkpoint that was written, or the `error` that prevented it (the old file is intact)."""

    step: int  # the step in the file
    path: str
    best: bool  # the checkpoint of the lowest validation loss
    loss: float  # its validation loss; nan for the newest checkpoint
    error: str = ""


@dataclass(frozen=True)
class NoteLog:
    """A notice to the user, in one line."""

    step: int
    text: str


@dataclass(frozen=True)
class TargetLog:
    """The step at which a run that ends by the clock is now expected to end."""

    step: int
    iters: int


@dataclass(frozen=True)
class EndLog:
    """The end of the steps; the last files are saved after it.

    `reason` is "target", "stopped" (by the user) or "patience" (early stopping).
    """

    step: int
    reason: str


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats; losses above 700 would overflow and count as 700."""
    return math.exp(min(loss, 700.0))


EarlyLog = EarlyEvalLog | EarlySampleLog
Report = StepLog | EvalLog | SampleLog | EarlyLog | SaveLog | NoteLog | TargetLog | EndLog


class Pace:
    """Recent steps per second: decaying sums, pauses excluded."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps = self._seconds = 0.0
        self._mark = clock()

    def step(self) -> None:
        """Count one step, and the time since the last call of any kind."""
        self._steps, self._seconds = 0.9 * self._steps + 1, 0.9 * self._seconds
        self.wait()

    def wait(self) -> None:
        """Count only the time since the last call: the device finished a step counted earlier."""
        now = self._clock()
        self._seconds += now - self._mark
        self._mark = now

    def restart(self) -> None:
        """Exclude the time since the last call."""
        self._mark = self._clock()

    @property
    def steps_per_second(self) -> float:
        """Return the recent rate."""
        return self._steps / max(self._seconds, 1e-9)
