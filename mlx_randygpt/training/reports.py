"""What a run tells while it goes on: frozen records of plain numbers and texts, and its pace.

`train` yields them; screens, logs and tests read them. Nothing here knows either side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepLog:
    """One optimizer step."""

    step: int  # steps taken so far, this one included
    loss: float  # mean over the step's tokens, nats
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # trained on so far, earlier parts of the run included
    tokens_per_second: float  # recent, without evaluations
    seconds: float  # spent training so far, earlier parts of the run included
    memory_bytes: int
    bits_per_byte: float = math.nan  # `loss` over the bytes of what was predicted


@dataclass(frozen=True)
class EvalLog:
    """One evaluation on the validation split."""

    step: int
    val_loss: float  # nats per token
    bits_per_byte: float
    best_loss: float  # of the run, this one included
    best_step: int
    seconds: float  # spent training so far, earlier parts of the run included

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.val_loss, 700.0))


@dataclass(frozen=True)
class SampleLog:
    """A text the model wrote; `prompt` is not part of `text`."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class SaveLog:
    """A file written, or not written: then `error` says why and the old file is intact."""

    step: int  # that the file holds
    path: str
    best: bool  # the checkpoint of the lowest validation loss
    loss: float  # that loss; nan for the newest checkpoint
    error: str = ""


@dataclass(frozen=True)
class NoteLog:
    """Something the person should know, in one line."""

    step: int
    text: str


@dataclass(frozen=True)
class EndLog:
    """No step follows: `reason` is "target", "stopped" (asked to) or "patience" (early stop).
    The last files are saved after it."""

    step: int
    reason: str


Report = StepLog | EvalLog | SampleLog | SaveLog | NoteLog | EndLog


class Pace:
    """Steps per second of late: sums that forget, with pauses left out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps = self._seconds = 0.0
        self._mark = clock()

    def step(self) -> None:
        """Count one step, and the time since the last call of any kind."""
        self._steps, self._seconds = 0.9 * self._steps + 1, 0.9 * self._seconds
        self.wait()

    def wait(self) -> None:
        """Count the time alone: a device has finished a step that was counted when it began."""
        now = self._clock()
        self._seconds += now - self._mark
        self._mark = now

    def restart(self) -> None:
        """Leave out the time since the last call."""
        self._mark = self._clock()

    @property
    def steps_per_second(self) -> float:
        return self._steps / max(self._seconds, 1e-9)
