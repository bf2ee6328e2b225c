"""What a resumed run's screen knows of the steps before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from mlx_randygpt.cli import group
from mlx_randygpt.cli.training import run as training_run
from mlx_randygpt.cli.training import text as training_text
from mlx_randygpt.data import DataError
from mlx_randygpt.progress import Progress
from mlx_randygpt.screen.dashboard import Dashboard, make_view, screen
from mlx_randygpt.screen.history import History, read_history
from mlx_randygpt.screen.plain import PlainLog
from mlx_randygpt.screen.run_summary import RunInfo, RunSummary
from mlx_randygpt.training.reports import SampleLog

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


def test_the_last_sample_up_to_the_step_comes_back(tmp_path: Path) -> None:
    rows = [{"step": n, "prompt": "A", "text": f" {n}"} for n in (2, 4, 6)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_history(tmp_path, 5, PROGRESS).samples[-1] == SampleLog(4, "A", " 4")


@pytest.fixture
def infos(monkeypatch: pytest.MonkeyPatch) -> list[RunInfo]:
    """What each run of `mlxgpt train` gives to its screen."""
    seen: list[RunInfo] = []

    def noting(info: RunInfo, console: Console, plain: bool) -> Dashboard | PlainLog:
        seen.append(info)
        return make_view(info, console, plain)

    monkeypatch.setattr(training_run, "make_view", noting)
    return seen


def test_a_resumed_run_shows_its_past_on_the_screen(tmp_path: Path, infos: list[RunInfo]) -> None:
    text, out = tmp_path / "t.txt", tmp_path / "out"
    text.write_text("the cat sat on the mat. " * 200)
    words = f"train --out {out} --backend numpy --threads 1 --plain --schedule constant"
    first = f"--data {text} --preset mini --batch-size 4 --eval-every 10 --sample-every 15"
    for more in (f"{first} --iters 40", "--iters 60 --resume"):
        assert CliRunner().invoke(group, f"{words} {more}".split()).exit_code == 0
    info = infos[-1]
    assert [e.step for e in info.history.evaluations] == [0, 10, 20, 30, 40]
    assert [int(step) for step, _ in info.history.losses] == list(range(1, 41))
    assert info.early == frozenset()  # the intervals of the first run were given
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    last = next(row for row in rows if row["step"] == 40)
    past = RunSummary(info, float)
    lines = screen(past, Console(width=80, height=24), 80, 24)
    shown = "\n".join(line.plain for line in lines)
    assert shown.count("●") >= 4  # and the legend's; two marks can share a place
    val_loss = f"{info.history.evaluations[-1].val_loss:.4f}"
    for part in ("resumed at 40", "step 40 of 60", val_loss, "next at step 50",
                 "step 40, next at step 45", last["text"].split()[0]):  # fmt: skip
        assert part in shown


def test_a_run_with_usual_intervals_looks_early(tmp_path: Path, infos: list[RunInfo]) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 200)
    words = f"train --data {tmp_path}/t.txt --backend numpy --threads 1 --preset mini --plain"
    for i, more in enumerate(("", "--eval-every 250")):
        call = f"{words} --iters 2 --batch-size 2 --out {tmp_path / str(i)} {more}"
        assert CliRunner().invoke(group, call.split()).exit_code == 0
    assert [info.early for info in infos] == [{"evaluation", "sample"}, {"sample"}]


def test_why_there_is_another_text_stays_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise DataError("no connection")

    shown: list[str] = []
    monkeypatch.setattr(Dashboard, "note", lambda self, text: shown.append(text))
    monkeypatch.setattr(training_text, "download_shakespeare", fail)
    monkeypatch.chdir(tmp_path)
    words = "train --backend numpy --threads 1 --preset mini --iters 1 --batch-size 2"
    with (tmp_path / "screen").open("w") as file:
        terminal = Console(file=file, force_terminal=True)
        view = Dashboard(RunInfo("", "", "", "", "", "", 1), terminal)
        monkeypatch.setattr(training_run, "make_view", lambda info, console, plain: view)
        done = CliRunner().invoke(group, words.split())
    assert done.exit_code == 0, done.output
    reason = "Text: the sample corpus inside the package (no connection)"
    assert reason in shown
    assert reason in done.stderr  # for a pipe, and after the run
