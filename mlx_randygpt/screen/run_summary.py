"""What a run has reported so far, in bounded memory, and its plain log, a line for each report.

Owns the smoothed loss, the thinned curves, the pace, the time left and the wording of a line.
Knows nothing of screens. Text from outside leaves it without control characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mlx_randygpt.screen.curve import Curve
from mlx_randygpt.screen.words import clean, duration, short, size, speed
from mlx_randygpt.training.reports import (
    EndLog,
    EvalLog,
    NoteLog,
    Report,
    SampleLog,
    SaveLog,
    StepLog,
)

Clock = Callable[[], float]

SMOOTHING = 0.05  # weight of the newest loss in the smoothed one: about the last 20 reports
FEW_STEPS = 10  # fewer give no mean speed
N_EVENTS = 10  # notes and saved files remembered for the end
ENDINGS = {"stopped": ", stopped on request", "patience": ", stopped early: no new best"}


@dataclass(frozen=True)
class RunInfo:
    """The facts of a run that stay the same, worded as they are shown."""

    model: str  # "1.2 M parameters, 6 layers × 8 heads × 128, context 64"
    data: str  # "data/shakespeare.txt: 1,115,394 characters, vocabulary 68"
    backend: str  # "NumPy on 2 threads (MLX has no GPU here)"
    recipe: str
    saves: str  # where the next save goes: "checkpoints/checkpoint.safetensors, every 60s"
    out: str
    iters: int
    start_step: int = 0


class RunSummary:
    """What has been reported so far, in bounded memory, and the times that follow from it."""

    def __init__(self, info: RunInfo, clock: Clock) -> None:
        self.info = info
        self.losses, self.val_losses = Curve(256), Curve(128)
        self.first: StepLog | None = None
        self.last: StepLog | None = None
        self.evaluation: EvalLog | None = None
        self.sample: SampleLog | None = None
        self.end: EndLog | None = None
        self.events: dict[str, tuple[str, str]] = {}  # by path or text: line, style
        self.loss = math.nan  # smoothed
        self._tokens_per_step = 0.0
        self._clock = clock
        self._began = self._first_at = clock()

    def add(self, report: Report) -> None:
        if isinstance(report, StepLog):
            self._add_step(report)
        elif isinstance(report, EvalLog):
            self.evaluation = report
            self.val_losses.add(report.step, report.val_loss)
        elif isinstance(report, SampleLog):
            self.sample = report
        elif isinstance(report, EndLog):
            self.end = report
        elif isinstance(report, NoteLog):
            self.add_event(report.text, clean(report.text), "magenta")
        else:
            self.add_event(report.path, save_line(report), "red" if report.error else "green")

    def add_event(self, key: str, line: str, style: str = "bold") -> None:
        self.events.pop(key, None)  # the newest of a kind comes last
        self.events[key] = (line, style)
        if len(self.events) > N_EVENTS:
            del self.events[next(iter(self.events))]

    def _add_step(self, log: StepLog) -> None:
        if self.last is None:
            self.first, self._first_at = log, self._clock()
            self._tokens_per_step = log.tokens / max(log.step, 1)
        elif log.step > self.last.step:
            self._tokens_per_step = (log.tokens - self.last.tokens) / (log.step - self.last.step)
        self.last = log
        if math.isfinite(log.loss):
            old = self.loss if math.isfinite(self.loss) else log.loss
            self.loss = old + SMOOTHING * (log.loss - old)
            self.losses.add(log.step, self.loss)

    @property
    def step(self) -> int:
        return self.last.step if self.last else self.info.start_step

    @property
    def steps_per_second(self) -> float:
        return self.last.tokens_per_second / max(self._tokens_per_step, 1) if self.last else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Since the first report of this session, evaluations included. That report comes when the
        second step is taken, so a few steps tell nothing: their pace does."""
        first, last = self.first, self.last
        if not first or not last:
            return 0.0
        if last.step - first.step < FEW_STEPS or last.seconds <= first.seconds:
            return last.tokens_per_second
        return (last.tokens - first.tokens) / (last.seconds - first.seconds)

    @property
    def elapsed(self) -> float:
        """Seconds of this session."""
        return self._clock() - self._began

    @property
    def left(self) -> float:
        """Seconds to the target at this session's mean pace, evaluations included; nan: unknown."""
        n_left = max(self.info.iters - self.step, 0)
        n_done = self.step - self.first.step if self.first else 0
        if n_done:  # counted from the first report: what came before it was compiling
            return n_left * (self._clock() - self._first_at) / n_done
        return n_left / self.steps_per_second if self.steps_per_second else math.nan


def save_line(log: SaveLog) -> str:
    """What became of a checkpoint; scripts look for the spelling."""
    path = clean(log.path)
    if log.error:
        return f"✗ Could not save {path}: {clean(log.error)} (the old file is intact)"
    what = f"best loss {log.loss:.4f} @{log.step}" if log.best else f"iter {log.step}"
    return f"✓ Saved {path} ({what})"


def step_line(tally: RunSummary) -> str:
    log = tally.last
    assert log is not None
    return (
        f"step {log.step}/{tally.info.iters} | loss {log.loss:.4f} | "
        f"{log.bits_per_byte:.2f} bits/byte | lr {log.lr:.2e} | "
        f"grad {short(log.grad_norm, 2)} | {log.tokens_per_second:,.0f} tok/s | "
        f"{speed(tally.steps_per_second)} | {duration(tally.elapsed)} elapsed | "
        f"{duration(tally.left)} left"
    )


def eval_line(log: EvalLog) -> str:
    best = "best" if log.best_step == log.step else f"best {log.best_loss:.4f} @{log.best_step}"
    return (
        f"eval {log.step} | val loss {log.val_loss:.4f} | perplexity {short(log.perplexity, 2)}"
        f" | {log.bits_per_byte:.2f} bits/byte | {best}"
    )


def numbers(tally: RunSummary) -> list[tuple[str, ...]]:
    """The numbers of the moment: a name, the value, up to two details."""
    log, val = tally.last, tally.evaluation
    if log is None:
        return [("loss", "–", "first step …"), ("validation", "–"), ("best", "–")]
    pace = (f"{log.tokens_per_second:,.0f} tok/s", speed(tally.steps_per_second))
    return [
        ("loss", f"{tally.loss:.4f}", f"raw {log.loss:.4f}", f"{log.bits_per_byte:.2f} bpb"),
        *(_validation(val) if val else [("validation", "–"), ("best", "–")]),
        ("learning rate", f"{log.lr:.2e}", f"gradient {short(log.grad_norm, 2)}"),
        ("speed", *pace, size(log.memory_bytes)),
    ]


def _validation(log: EvalLog) -> list[tuple[str, ...]]:
    measures = (f"perplexity {short(log.perplexity, 2)}", f"{log.bits_per_byte:.2f} bits/byte")
    return [
        ("validation", f"{log.val_loss:.4f}", *measures),
        ("best", f"{log.best_loss:.4f}", f"at step {log.best_step:,}"),
    ]


def outcome(tally: RunSummary) -> list[tuple[str, str]]:
    """What came of the run, as names and values; empty before the first step."""
    log, best = tally.last, tally.evaluation
    if log is None:
        return []
    ending = ENDINGS.get(tally.end.reason, "") if tally.end else ""
    steps = f"{log.step:,} of {tally.info.iters:,}{ending}"
    facts = [("steps", steps), ("loss", f"{tally.loss:.4f}")]
    if best:
        facts.append(("best validation loss", f"{best.best_loss:.4f} at step {best.best_step:,}"))
    pace = f"{tally.tokens_per_second:,.0f} tokens/s"
    return [*facts, ("time", f"{duration(tally.elapsed)}, {pace}")]
