"""A Mac stays awake while it trains, and rings after a long run."""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_randygpt.cli import group
from mlx_randygpt.cli.training import awake, run
from mlx_randygpt.cli.training.awake import KeepAwake

RUN = ["train", "--plain", "--data", "text.txt", "--preset", "mini", "--iters", "2"]
RUN += ["--backend", "numpy", "--batch-size", "2"]


@pytest.fixture
def mac(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the pipe to which a `caffeinate` on PATH writes its options, on what seems a Mac."""
    monkeypatch.setattr(awake.sys, "platform", "darwin")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)
    os.mkfifo(said := tmp_path / "said")
    program = tmp_path / "caffeinate"
    program.write_text(f'#!/bin/sh\necho "$@" > {said}\nexec tail -f /dev/null\n')
    program.chmod(0o755)
    return said


def test_caffeinate_runs_beside_the_run_and_ends_with_it(mac: Path) -> None:
    with KeepAwake() as keeper:
        assert mac.read_text() == f"-is -w {os.getpid()}\n"  # never -d
        process = keeper._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize("allow_sleep", [False, True])
def test_a_run_says_whether_the_mac_stays_awake(
    mac: Path, allow_sleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    real = awake.subprocess.Popen
    monkeypatch.setattr(
        awake.subprocess, "Popen", lambda *a, **k: started.append(a) or real(*a, **k)
    )
    done = CliRunner().invoke(group, RUN + ["--allow-sleep"] * allow_sleep)
    assert done.exit_code == 0, done.output
    assert ("stays awake during the run; --allow-sleep lets it sleep" in done.stdout) != allow_sleep
    assert bool(started) != allow_sleep


def test_a_mac_without_caffeinate_trains_and_may_sleep(
    mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mac.parent / "caffeinate").unlink()
    done = CliRunner().invoke(group, RUN)
    assert done.exit_code == 0
    assert "The Mac may sleep during the run: caffeinate: No such file or directory." in done.stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="about other systems")
def test_other_systems_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake.subprocess, "Popen", None)
    with KeepAwake() as keeper:
        assert keeper.note == ""


@pytest.mark.parametrize(("seconds", "rings"), [(299, 0), (301, 1)])
@pytest.mark.parametrize("fails", [False, True])
def test_a_long_run_rings_however_it_ends(
    seconds: int, rings: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bells: list[int] = []
    monkeypatch.setattr(run, "ring_bell", lambda: bells.append(1))
    monkeypatch.setattr(run, "_train", lambda request: 1 // (0 if fails else 1))
    clock = count(1000, seconds)
    try:
        run.train_command(None, lambda: next(clock))  # type: ignore[arg-type]
    except ZeroDivisionError:
        assert fails
    assert len(bells) == rings


def test_the_bell_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.ring_bell()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mlx_randygpt.cli.output.is_terminal", lambda stream: True)
    run.ring_bell()
    assert capsys.readouterr().err == "\a"
