"""What a resumed run's screen knows of the steps before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlx_randygpt.progress import Progress
from mlx_randygpt.screen.history import History, read_history

PROGRESS = Progress(val_loss=2.5, eval_step=4, best_loss=2.0, best_step=2, bits_per_byte=3.6)


def write(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_losses_and_evaluations_up_to_the_step_come_back(tmp_path: Path) -> None:
    losses = [{"step": n, "loss": 4.0 - n / 10} for n in range(1, 7)]
    marks = [{"step": n, "val_loss": loss} for n, loss in ((0, 4.0), (2, 2.0), (4, 2.6), (6, 9.0))]
    write(tmp_path, *losses, *marks)
    past = read_history(tmp_path, 5, PROGRESS)
    assert past.losses == tuple((n, 4.0 - n / 10) for n in range(1, 6))
    assert [(e.step, e.val_loss, e.best_loss, e.best_step) for e in past.evaluations] == [
        (0, 4.0, 4.0, 0),
        (2, 2.0, 2.0, 2),
        (4, 2.5, 2.0, 2),  # as the checkpoint has it
    ]
    assert math.isclose(past.recent_loss, 3.7)


def test_without_metrics_the_checkpoint_has_the_last_evaluation(tmp_path: Path) -> None:
    past = read_history(tmp_path, 5, PROGRESS)
    assert [(e.val_loss, e.best_step) for e in past.evaluations] == [(2.5, 2)]
    assert math.isnan(past.recent_loss)


def test_a_damaged_metrics_file_spoils_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "b"}\n[1]\n{"st')
    assert read_history(tmp_path, 5, Progress()) == History()
