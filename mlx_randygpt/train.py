"""The training loop: batch, rate, step, report. One for every backend.

`train` is a generator of reports; who consumes them decides what to show. It owns the order of
things (evaluate, sample, save, step) and never touches a terminal, a signal or a device.
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class EvalLog:
    """One evaluation on the validation split."""

    step: int
    val_loss: float  # nats per token
    bits_per_byte: float
    best_loss: float  # of the run, this one included
    best_step: int
    seconds: float

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

    step: int
    path: str
    best: bool  # the checkpoint of the lowest validation loss
    loss: float  # that loss; nan for the newest checkpoint
    error: str = ""


Report = StepLog | EvalLog | SampleLog | SaveLog
