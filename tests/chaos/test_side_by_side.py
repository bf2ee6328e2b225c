"""Several processes and one folder: two runs that start together, and readers while a run saves."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from harness import PROGRAM
from process import Life

from mlx_randygpt.checkpoint import NEWEST, PREVIOUS
from mlx_randygpt.cli import group

pytestmark = pytest.mark.slow
N_TIMES, N_READS = 20, 200
SIZES = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--batch-size=2"]
SETTINGS = ["--threads=1", "--eval-every=20", *SIZES]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (path := tmp_path / "text").write_text("to be or not to be\n" * 100)
    return path


def start(text: Path, out: Path, *words: str) -> Life:
    data = ["--data", str(text), "--out", str(out)]
    return Life([*PROGRAM, *SETTINGS, *data, *words], deadline=600)


def test_of_two_runs_that_start_together_one_is_refused(tmp_path: Path, text: Path) -> None:
    ends = Counter[tuple[int, ...]]()
    for i in range(N_TIMES):
        out = tmp_path / str(i)
        runs = [start(text, out, "--iters=200", "--save-every=5") for _ in range(2)]
        codes = [run.finish().code for run in runs]
        ends[tuple(sorted(codes))] += 1
        for run in runs:
            assert run.code == 0 or "already holds" in run.errors or "is in use by" in run.errors
        assert not list(out.glob(".*.tmp"))
        assert CliRunner().invoke(group, ["info", str(out / NEWEST)]).exit_code == 0
    assert ends == {(0, 1): N_TIMES}


@pytest.fixture
def saving(tmp_path: Path, text: Path) -> Iterator[Path]:
    """A run that saves after each step, and never ends by itself."""
    words = ["--iters=100000000", "--save-every=1", "--sample-every=50"]
    run = start(text, out := tmp_path / "out", *words)
    assert run.passes(100)
    yield out
    run.send(15)
    assert run.finish().code == 143


def test_no_reader_fails_while_a_run_saves(saving: Path) -> None:
    picture = str(saving.parent / "picture.svg")
    commands = [
        ["info", str(saving)],
        ["info", str(saving / NEWEST)],
        ["info", str(saving / PREVIOUS)],
        ["sample", "--checkpoint", str(saving), "--backend=numpy", "--max-tokens=3"],
        ["sample", "--checkpoint", str(saving / NEWEST), "--backend=numpy", "--max-tokens=3"],
        ["runs", str(saving.parent)],
        ["plot", str(saving), "-o", picture],
    ]
    before = os.stat(saving / NEWEST).st_mtime_ns
    for i in range(N_READS):
        result = CliRunner().invoke(group, commands[i % len(commands)])
        assert result.exit_code == 0, (commands[i % len(commands)], result.output)
    assert os.stat(saving / NEWEST).st_mtime_ns != before
    refused = CliRunner().invoke(group, ["train", "--plain", "--out", str(saving), "--resume"])
    assert refused.exit_code == 1
    assert "is in use by another run" in refused.output
