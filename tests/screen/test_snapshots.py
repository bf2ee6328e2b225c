"""What a person sees, as text at three sizes of the terminal.

After an intended change: `UPDATE_SNAPSHOTS=1 pytest tests/screen/test_snapshots.py`, and read the
difference before committing it.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from mlx_randygpt.analysis.metrics import metrics_row
from mlx_randygpt.cli import group
from mlx_randygpt.screen.dashboard import screen, summary
from mlx_randygpt.screen.history import History
from mlx_randygpt.screen.run_summary import Event, RunInfo, RunSummary
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
)

SNAPSHOTS = Path(__file__).with_name("snapshots")
SIZES = [(60, 20), (80, 24), (140, 45)]
INFO = RunInfo(
    model="1.2 M parameters, 6 layers × 8 heads × 128, context 64",
    data="shakespeare.txt: 1,115,394 characters, vocabulary 68",
    backend="NumPy on 2 threads (MLX has no GPU here)",
    recipe="modern",
    saves="checkpoints/checkpoint.safetensors, every 60s",
    out="checkpoints",
    iters=1000,
    eval_every=250,
    sample_every=100,
    early=frozenset({"evaluation", "sample"}),
)
VERSE = (
    "\nWhat light is this that in the window stands?"
    "\nIt is the east, and there the morning walks.\n"
    "\nJULIET:\nThen let it be; the night was long enough,"
    "\nand all that slept in it are waking now."
)
OFFLINE = "Text: the sample corpus inside the package (no connection)"


def step(n: int) -> StepLog:
    return StepLog(
        step=n,
        loss=1.5 + 2.7 * math.exp(-n / 100),
        lr=0.02 * (1 - n / 1000),
        grad_norm=0.42,
        tokens=n * 4096,
        tokens_per_second=21_300.0,
        seconds=n / 5.2,
        memory_bytes=312_000_000,
        bits_per_byte=2.4,
    )


def evaluation(n: int) -> EvalLog:
    loss = 1.7 + 2.7 * math.exp(-n / 100)
    return EvalLog(n, loss, loss / math.log(2), loss, n, n / 5.2)


def reports(last: int) -> Iterator[Report]:
    yield evaluation(0)
    for n in range(1, last + 1):
        yield step(n)
        if n % 250 == 0:
            yield evaluation(n)
            yield SaveLog(
                n, "checkpoints/checkpoint_best.safetensors", True, evaluation(n).val_loss
            )
        if n % 100 == 0:
            yield SampleLog(n, "ROMEO:", f"{VERSE}\nAt step {n}.")


def run_of(info: RunInfo, *some: Report) -> RunSummary:
    run = RunSummary(info, lambda: 115.0)
    for report in some:
        run.add(report)
    return run


def at_start() -> RunSummary:
    run = run_of(INFO, evaluation(0))
    run.add_event(OFFLINE, Event(OFFLINE))
    return run


def early() -> RunSummary:
    looks = (EarlyEvalLog(40, 2.25, 3.2, 2500, 20.0), EarlySampleLog(40, "ROMEO:", VERSE, 20.0))
    return run_of(INFO, evaluation(0), *map(step, range(1, 41)), *looks)


def halfway() -> RunSummary:
    return run_of(INFO, *reports(600), NoteLog(600, "Overfitting: no new best since step 250."))


def resumed() -> RunSummary:
    past = History(
        losses=tuple((n, step(n).loss) for n in range(1, 601)),
        evaluations=tuple(map(evaluation, (0, 250, 500))),
        samples=(SampleLog(500, "ROMEO:", VERSE),),
    )
    return run_of(replace(INFO, start_step=600, history=past))


def console(width: int, height: int) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, color_system=None)


def compare(name: str, text: str) -> None:
    """The text is that of the file; with UPDATE_SNAPSHOTS it becomes that of the file."""
    file = SNAPSHOTS / f"{name}.txt"
    text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    if os.environ.get("UPDATE_SNAPSHOTS"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("state", [at_start, early, halfway, resumed])
def test_the_live_screen(state: Callable[[], RunSummary], size: tuple[int, int]) -> None:
    out = console(*size)
    for line in screen(state(), out, *size):
        out.print(line)
    assert isinstance(out.file, io.StringIO)
    compare(f"{state.__name__}-{size[0]}x{size[1]}", out.file.getvalue())


@pytest.mark.parametrize("width", [60, 80, 140])
def test_what_a_run_leaves_behind(width: int) -> None:
    out = console(width, 24)
    for line in summary(run_of(INFO, *reports(1000), EndLog(1000, "done")), out):
        out.print(line, soft_wrap=True)
    assert isinstance(out.file, io.StringIO)
    compare(f"summary-{width}", out.file.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    for name, last, rate in (("small", 600, 0.02), ("slow", 300, 0.01)):
        (folder / name).mkdir()
        rows = (metrics_row(report, 1) for report in reports(last))
        lines = "".join(json.dumps(row) + "\n" for row in rows if row)
        (folder / name / "metrics.jsonl").write_text(lines)
        (folder / name / "config.toml").write_text(f"lr = {rate}\niters = {last}\n")
    return folder


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("words", ["plot", "plot small", "presets", "runs", "--help"])
def test_a_command(
    words: str, size: tuple[int, int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLXGPT_CACHE", str(folder))  # where doctor has measured nothing
    columns, rows = size
    environ = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": str(columns), "LINES": str(rows)}
    monkeypatch.setattr("mlx_randygpt.cli.output.is_terminal", lambda stream: True)
    options = {"prog_name": "mlxgpt", "terminal_width": min(columns, 80)}
    done = CliRunner().invoke(group, words.split(), env=environ, **options)
    assert done.exit_code == 0, done.output
    name = words.replace(" ", "-").replace("--", "")
    compare(f"{name}-{columns}x{rows}", re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))
