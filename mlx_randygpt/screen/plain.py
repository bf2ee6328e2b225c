"""The plain log of a run: one line per report, for pipes, files and `--plain`."""

from __future__ import annotations

import time
from typing import IO

from mlx_randygpt.screen.run_summary import (
    Clock,
    RunInfo,
    RunSummary,
    eval_line,
    outcome,
    save_line,
    step_line,
)
from mlx_randygpt.screen.words import clean
from mlx_randygpt.training.reports import (
    EvalLog,
    NoteLog,
    Report,
    SampleLog,
    SaveLog,
    StepLog,
)


class PlainLog:
    """One line a report, without control codes: for pipes, files and --plain.

    Steps are many: at most one a second is printed, and the first, the last and the one that any
    other line follows.
    """

    def __init__(self, info: RunInfo, file: IO[str], clock: Clock = time.monotonic) -> None:
        self._tally = RunSummary(info, clock)
        self._file = file
        self._clock = clock
        self._due_at = clock()
        self._unprinted = False

    def __enter__(self) -> PlainLog:
        info = self._tally.info
        backend = f"Backend: {info.backend}"
        for line in (info.model, info.data, backend, f"{info.recipe} recipe, {info.saves}"):
            self._print(line)
        return self

    def __exit__(self, *_: object) -> None:
        self._print_step()
        for name, value in outcome(self._tally):
            self._print(f"{name}: {value}")

    def show(self, report: Report) -> None:
        self._tally.add(report)
        if isinstance(report, StepLog):
            self._unprinted = True
            if self._clock() >= self._due_at or report.step >= self._tally.info.iters:
                self._print_step()
            return
        self._print_step()
        if isinstance(report, EvalLog):
            self._print(eval_line(report))
        elif isinstance(report, SaveLog):
            self._print(save_line(report))
        elif isinstance(report, NoteLog):
            self._print(report.text)
        elif isinstance(report, SampleLog):
            self._print(f"sample {report.step}")
            for line in clean(report.prompt + report.text, keep="\n").split("\n"):
                self._print(f"    {line}")

    def note(self, text: str) -> None:
        self._print_step()
        self._print(text)

    def release_terminal(self) -> None:
        """No terminal to release."""

    def reclaim_terminal(self) -> None:
        """No terminal to reclaim."""

    def _print_step(self) -> None:
        if self._unprinted:
            self._print(step_line(self._tally))
            self._unprinted = False
            self._due_at = self._clock() + 1.0

    def _print(self, line: str) -> None:
        self._file.write(clean(line) + "\n")
        self._file.flush()
