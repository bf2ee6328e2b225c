"""What a resumed run did before: its losses and evaluations, read from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_randygpt.analysis.metrics import read_metrics, read_samples
from mlx_randygpt.files import is_file
from mlx_randygpt.progress import Progress
from mlx_randygpt.training.reports import EvalLog, SampleLog

N_RECENT = 20  # losses in `recent_loss`
MAX_SAMPLES = 8  # as many as a tall screen has room for


@dataclass(frozen=True)
class History:
    """The earlier steps of a run: losses as (step, loss), evaluations and the last samples."""

    losses: tuple[tuple[float, float], ...] = ()
    evaluations: tuple[EvalLog, ...] = ()
    samples: tuple[SampleLog, ...] = ()

    @property
    def recent_loss(self) -> float:
        """Return the mean of the last losses; nan if there are none."""
        last = [loss for _, loss in self.losses[-N_RECENT:]]
        return sum(last) / len(last) if last else math.nan


def read_history(folder: Path, step: int, progress: Progress) -> History:
    """Return what happened up to `step`; without metrics in the folder, the last evaluation only.

    The checkpoint's own progress counts where the metrics say something else.
    """
    losses: tuple[tuple[float, float], ...] = ()
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    try:
        if is_file(file := folder / "metrics.jsonl"):
            record = read_metrics(file)
            table = record.series["loss"][:, :2]
            losses = tuple((float(at), float(loss)) for at, loss in table if at <= step)
            rows = [row for row in record.evaluations if row["step"] < progress.eval_step]
        samples = [row for row in read_samples(folder / "samples.jsonl") if row["step"] <= step]
    except OSError:
        pass  # a screen without its past; the run itself reports a folder that it can't use
    evaluations = list(_with_best(rows))
    if progress.eval_step >= 0:
        evaluations.append(
            EvalLog(
                step=progress.eval_step,
                val_loss=progress.val_loss,
                bits_per_byte=progress.bits_per_byte,
                best_loss=progress.best_loss,
                best_step=progress.best_step,
                seconds=progress.seconds,
            )
        )
    last = (SampleLog(row["step"], row["prompt"], row["text"]) for row in samples[-MAX_SAMPLES:])
    return History(losses, tuple(evaluations), tuple(last))


def _with_best(rows: Iterable[dict[str, Any]]) -> Iterable[EvalLog]:
    best_loss, best_step = math.inf, 0
    for row in rows:
        if row["val_loss"] < best_loss:
            best_loss, best_step = row["val_loss"], row["step"]
        yield EvalLog(
            step=row["step"],
            val_loss=row["val_loss"],
            bits_per_byte=_number(row, "bits_per_byte"),
            best_loss=best_loss,
            best_step=best_step,
            seconds=_number(row, "seconds"),
        )


def _number(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else math.nan
