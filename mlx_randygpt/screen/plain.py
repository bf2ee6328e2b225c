"""The plain log of a run: one line per report, for pipes, files and `--plain`."""

from __future__ import annotations

import time
from typing import IO

from mlx_randygpt.screen.run_summary import (
    Clock,
    RunInfo,
    RunSummary,
    early_line,
    eval_line,
    outcome,
    save_line,
    step_line,
)
from mlx_randygpt.training.reports import (
    EarlyEvalLog,
    EarlySampleLog,
    EvalLog,
    NoteLog,
    Report,
    SampleLog,
    SaveLog,
    StepLog,
)
from mlx_randygpt.words import clean_text


class PlainLog:
    """Prints one line per report, without control codes.

    At most one step per second is printed, besides the first, the last, and the one before any
    other line.
    """

    def __init__(self, info: RunInfo, file: IO[str], clock: Clock = time.monotonic) -> None:
        self._run = RunSummary(info, clock)
        self._file = file
        self._clock = clock
        self._due_at = clock()
        self._unprinted = False

    def __enter__(self) -> PlainLog:
        info = self._run.info
        backend = f"Backend: {info.backend}"
        for line in (info.model, info.data, backend, f"{info.recipe} recipe, {info.saves}"):
            self._print(line)
        return self

    def __exit__(self, *_: object) -> None:
        self._print_step()
        for name, value in outcome(self._run):
            self._print(f"{name}: {value}")

    def show(self, report: Report) -> None:
        """Print a report, or hold back a step until the next line is due."""
        self._run.add(report)
        if isinstance(report, StepLog):
            self._unprinted = True
            if self._clock() >= self._due_at or report.step >= self._run.info.iters:
                self._print_step()
            return
        self._print_step()
        if isinstance(report, EvalLog):
            self._print(eval_line(report))
        elif isinstance(report, EarlyEvalLog):
            self._print(early_line(report))
        elif isinstance(report, SaveLog):
            self._print(save_line(report))
        elif isinstance(report, NoteLog):
            self._print(report.text)
        elif isinstance(report, SampleLog | EarlySampleLog):
            early = "early " if isinstance(report, EarlySampleLog) else ""
            self._print(f"{early}sample {report.step}")
            for line in clean_text(report.prompt + report.text, keep="\n").split("\n"):
                self._print(f"    {line}")

    def note(self, text: str) -> None:
        """Print a message."""
        self._print_step()
        self._print(text)

    def release_terminal(self) -> None:
        """No terminal to release."""

    def reclaim_terminal(self) -> None:
        """No terminal to reclaim."""

    def _print_step(self) -> None:
        if self._unprinted:
            self._print(step_line(self._run))
            self._unprinted = False
            self._due_at = self._clock() + 1.0

    def _print(self, line: str) -> None:
        self._file.write(clean_text(line) + "\n")
        self._file.flush()
