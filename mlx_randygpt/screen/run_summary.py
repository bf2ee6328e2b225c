"""Everything a run has reported so far, in bounded memory, and the wording of each line.

It computes the smoothed loss, the curves, the speed and the time left. Text from outside is
stripped of control characters.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum

from mlx_randygpt.screen.curve import Curve
from mlx_randygpt.screen.history import MAX_SAMPLES, History
from mlx_randygpt.training.early import FIRST_SECONDS
from mlx_randygpt.training.reports import (
    EarlyEvalLog,
    EarlySampleLog,
    EndLog,
    EvalLog,
    NoteLog,
    Report,
    SampleLog,
    SaveLog,
    StepLog,
    TargetLog,
    perplexity,
)
from mlx_randygpt.words import clean_text, format_bytes, format_clock

Clock = Callable[[], float]

SMOOTHING = 0.05  # weight of the newest loss in the moving average: about the last 20 reports
MIN_STEPS = 10  # fewer steps give no mean speed
MAX_EVENTS = 10  # messages and saved files to keep for the end
READINGS = (  # bits/byte of a validation loss, and what samples of such models were like: English
    (3.4, "letters in the right proportions, hardly a word"),
    (2.8, "short words among invented ones"),
    (2.4, "mostly real words that make no sense together"),
    (0.0, "real words and whole phrases, with little sense"),
)
ENDINGS = {"stopped": ", stopped on request", "patience": ", stopped early: no new best"}


class Urgency(IntEnum):
    """How much a message matters: from a note on, it stays on the screen."""

    SAVED = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True)
class Event:
    """One line for the screen: a message, or the name of a saved file."""

    line: str
    urgency: Urgency = Urgency.NOTE


@dataclass(frozen=True)
class RunInfo:
    """The constant facts of a run, worded as they are shown."""

    model: str  # "1.2 M parameters, 6 layers × 8 heads × 128, context 64"
    data: str  # "data/shakespeare.txt: 1,115,394 characters, vocabulary 68"
    backend: str  # "NumPy on 2 threads (MLX has no GPU here)"
    recipe: str
    saves: str  # "checkpoints/checkpoint.safetensors, every 60s"
    out: str
    iters: int
    start_step: int = 0
    history: History = field(default_factory=History)  # of the steps up to start_step
    eval_every: int = 0
    sample_every: int = 0
    early: frozenset[str] = frozenset()  # "evaluation", "sample": the kinds of early looks


class RunSummary:
    """The reports of a run in bounded memory, and the speed and times that follow from them."""

    def __init__(self, info: RunInfo, clock: Clock) -> None:
        self.info = info
        self.losses, self.val_losses = Curve(256), Curve(128)
        self.first: StepLog | None = None
        self.last: StepLog | None = None
        self.evaluation: EvalLog | None = None
        self.early: EarlyEvalLog | None = None  # since the last evaluation
        self.samples = deque[SampleLog | EarlySampleLog](info.history.samples, MAX_SAMPLES)
        self.end: EndLog | None = None
        self.events: dict[str, Event] = {}  # by path or text, the newest last
        self.loss = math.nan  # moving average
        self.val_rises = False  # the last evaluation was worse than the one before
        self._tokens_per_step = 0.0
        self._clock = clock
        self._look_at = math.inf  # when the next early look comes
        self._is_early = set(info.early)
        self._started = self._first_at = clock()
        for step, loss in info.history.losses:
            self._add_loss(step, loss)
        for evaluation in info.history.evaluations:
            self.add(evaluation)

    def add(self, report: Report) -> None:
        """Take a report into account."""
        if isinstance(report, StepLog):
            self._add_step(report)
        elif isinstance(report, EvalLog):
            self.val_rises = bool(self.evaluation and report.val_loss > self.evaluation.val_loss)
            self.evaluation, self.early = report, None
            if report.step > self.info.start_step:
                self._is_early.discard("evaluation")
            self.val_losses.add(report.step, report.val_loss)
        elif isinstance(report, SampleLog):
            self.samples.append(report)
            self._is_early.discard("sample")
        elif isinstance(report, EarlyEvalLog):
            self.early, self._look_at = report, self._clock() + report.next_seconds
        elif isinstance(report, EarlySampleLog):
            self.samples.append(report)
            self._look_at = self._clock() + report.next_seconds
        elif isinstance(report, EndLog):
            self.end = report
        elif isinstance(report, TargetLog):
            self.info = replace(self.info, iters=report.iters)
        elif isinstance(report, NoteLog):
            self.add_event(report.text, Event(clean_text(report.text), Urgency.WARNING))
        else:
            urgency = Urgency.ERROR if report.error else Urgency.SAVED
            self.add_event(report.path, Event(save_line(report), urgency))

    def add_event(self, key: str, event: Event) -> None:
        """Keep a line for the end, in place of an older one with the same key."""
        self.events.pop(key, None)  # the newest comes last
        self.events[key] = event
        if len(self.events) > MAX_EVENTS:
            del self.events[min(self.events, key=lambda key: self.events[key].urgency)]

    def _add_step(self, log: StepLog) -> None:
        if self.last is None:
            self.first, self._first_at = log, self._clock()
            self._look_at = self._first_at + FIRST_SECONDS
            self._tokens_per_step = log.tokens / max(log.step, 1)
        elif log.step > self.last.step:
            self._tokens_per_step = (log.tokens - self.last.tokens) / (log.step - self.last.step)
        self.last = log
        self._add_loss(log.step, log.loss)

    def _add_loss(self, step: float, loss: float) -> None:
        if math.isfinite(loss):
            old = self.loss if math.isfinite(self.loss) else loss
            self.loss = old + SMOOTHING * (loss - old)
            self.losses.add(step, self.loss)

    @property
    def sample(self) -> SampleLog | EarlySampleLog | None:
        """Return the last sample."""
        return self.samples[-1] if self.samples else None

    @property
    def step(self) -> int:
        """Return the step of the last report."""
        return self.last.step if self.last else self.info.start_step

    @property
    def first_step(self) -> int:
        """Return the first step that is known."""
        return 0 if self.info.history.losses else self.info.start_step

    @property
    def steps_per_second(self) -> float:
        """Return the recent speed."""
        return self.last.tokens_per_second / max(self._tokens_per_step, 1) if self.last else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Return the mean speed since the first report of this session, evaluations included.

        That report comes with the second step, so for a few steps the recent speed is returned.
        """
        first, last = self.first, self.last
        if not first or not last:
            return 0.0
        if last.step - first.step < MIN_STEPS or last.seconds <= first.seconds:
            return last.tokens_per_second
        return (last.tokens - first.tokens) / (last.seconds - first.seconds)

    @property
    def elapsed(self) -> float:
        """Return the seconds of this session."""
        return self._clock() - self._started

    @property
    def left(self) -> float:
        """Return the seconds to the target at the mean speed of this session; nan if unknown."""
        n_left = max(self.info.iters - self.step, 0)
        n_done = self.step - self.first.step if self.first else 0
        if n_done:  # count from the first report, because compiling comes before it
            return n_left * (self._clock() - self._first_at) / n_done
        return n_left / self.steps_per_second if self.steps_per_second else math.nan

    def next_time(self, kind: str) -> str:
        """Return when the next evaluation or sample comes: `in 00:12`, `at step 250`, or ""."""
        every = self.info.eval_every if kind == "evaluation" else self.info.sample_every
        last = self.info.iters
        step = min((self.step // every + 1) * every, last) if every else last
        if self.end or self.step >= last:
            return ""
        pace = self.steps_per_second
        seconds = (step - self.step) / pace if pace else math.inf
        if kind in self._is_early:
            early = max(self._look_at - self._clock(), 0.0) if self.last else FIRST_SECONDS
            seconds = min(seconds, early)
        return f"in {format_clock(seconds)}" if seconds < math.inf else f"at step {step:,}"


def save_line(log: SaveLog) -> str:
    """Return the line about a saved checkpoint; scripts match its wording."""
    path = clean_text(log.path)
    if log.error:
        return f"✗ Could not save {path}: {clean_text(log.error)} (the old file is intact)"
    label = f"best loss {log.loss:.4f} @{log.step}" if log.best else f"iter {log.step}"
    return f"✓ Saved {path} ({label})"


def step_line(run: RunSummary) -> str:
    """Return the line about the last step."""
    log = run.last
    assert log is not None
    return (
        f"step {log.step}/{run.info.iters} | loss {log.loss:.4f} | "
        f"{log.bits_per_byte:.2f} bits/byte | lr {log.lr:.2e} | "
        f"grad {_fixed(log.grad_norm, 2)} | {log.tokens_per_second:,.0f} tok/s | "
        f"{_speed(run.steps_per_second)} it/s | {format_clock(run.elapsed)} elapsed | "
        f"{format_clock(run.left)} left"
    )


def eval_line(log: EvalLog) -> str:
    """Return the line about an evaluation."""
    best = "best" if log.best_step == log.step else f"best {log.best_loss:.4f} @{log.best_step}"
    return (
        f"eval {log.step} | val loss {log.val_loss:.4f} | perplexity {_fixed(log.perplexity, 2)}"
        f" | {log.bits_per_byte:.2f} bits/byte | {best}"
    )


def early_line(log: EarlyEvalLog) -> str:
    """Return the line about an early validation loss."""
    return (
        f"early eval {log.step} | val loss {log.val_loss:.4f} | perplexity "
        f"{_fixed(log.perplexity, 2)} | {log.bits_per_byte:.2f} bits/byte | "
        f"{log.tokens:,} tokens | next in {format_clock(log.next_seconds)}"
    )


def numbers(run: RunSummary) -> list[tuple[str, ...]]:
    """Return the current numbers: a name, the value, up to two details."""
    log = run.last
    if log is None:
        loss = f"{run.loss:.4f}" if math.isfinite(run.loss) else "–"
        return [("loss", loss, "first step …"), _validation(run), _best(run)]
    pace = (f"{log.tokens_per_second:,.0f} tok/s", f"{_speed(run.steps_per_second)} steps/s")
    return [
        ("loss", f"{run.loss:.4f}", f"raw {log.loss:.4f}", f"{log.bits_per_byte:.2f} bits/byte"),
        _validation(run),
        _best(run),
        ("learning rate", f"{log.lr:.2e}", f"gradient {_fixed(log.grad_norm, 2)}"),
        ("speed", *pace, format_bytes(log.memory_bytes)),
    ]


def _validation(run: RunSummary) -> tuple[str, ...]:
    if early := run.early:
        place = f"early, step {early.step:,}"
        return ("validation", f"{early.val_loss:.4f}", place, f"{early.tokens:,} tokens")
    if not (log := run.evaluation):
        return ("validation", "–")
    perplexity = f"perplexity {_fixed(log.perplexity, 2)}"
    if log.step == 0:
        return ("validation", f"{log.val_loss:.4f}", "at the start", perplexity)
    return ("validation", f"{log.val_loss:.4f}", perplexity, f"{log.bits_per_byte:.2f} bits/byte")


def _best(run: RunSummary) -> tuple[str, ...]:
    """Return the best validation loss and when the next one comes."""
    when = run.next_time("evaluation")
    upcoming = (f"next {when}",) if when else ()
    if not (log := run.evaluation):
        return ("best", "–", *upcoming)
    return ("best", f"{log.best_loss:.4f}", f"at step {log.best_step:,}", *upcoming)


def outcome(run: RunSummary) -> list[tuple[str, str]]:
    """Return the outcome of the run as names and values; empty before the first step."""
    log, best = run.last, run.evaluation
    if log is None:
        return []
    ending = ENDINGS.get(run.end.reason, "") if run.end else ""
    steps = f"{log.step:,} of {run.info.iters:,}{ending}"
    facts = [("steps", steps), ("loss", f"{run.loss:.4f}")]
    if best:
        facts.append(("best validation loss", f"{best.best_loss:.4f} at step {best.best_step:,}"))
        facts += _meaning(best)
    pace = f"{run.tokens_per_second:,.0f} tokens/s"
    return [*facts, ("time", f"{format_clock(run.elapsed)}, {pace}")]


def _meaning(log: EvalLog) -> list[tuple[str, str]]:
    """Return what the best validation loss means, as names and values."""
    if not 0 < log.best_loss < math.inf or not log.val_loss:
        return []
    choices = f"as unsure as among {_fixed(perplexity(log.best_loss), 1)} equally likely tokens"
    bits = log.bits_per_byte * log.best_loss / log.val_loss
    if not math.isfinite(bits):  # older files lack it
        return [("that is", choices)]
    reading = next(reading for least, reading in READINGS if bits >= least)
    return [("that is", choices), ("English reads then", f"{reading} ({bits:.2f} bits/byte)")]


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.1e}"


def _speed(steps_per_second: float) -> str:
    return f"{steps_per_second:.{1 if steps_per_second >= 1 else 2}f}"
