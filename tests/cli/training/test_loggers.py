"""`--log`: what other libraries are told, with stand-ins for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.cli import group
from mlx_randygpt.config import install_command

LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Fake:
    """A stand-in for all three libraries: what it was told, and an error on request."""

    def __init__(self, fails_at: int = -1) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.settings: dict[str, Any] = {}
        self.closed, self._fails_at = 0, fails_at

    def install(self, name: str, monkeypatch: pytest.MonkeyPatch) -> Fake:
        module = SimpleNamespace(SummaryWriter=self.init, init=self.init, log=self.log,
                                 finish=self.close)  # fmt: skip
        monkeypatch.setitem(sys.modules, LIBRARIES[name], module)  # type: ignore[arg-type]
        return self

    def init(self, **about: Any) -> Fake:
        if self._fails_at == 0:
            raise ConnectionError("no account")
        self.settings = about
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self._fails_at:
            raise ConnectionError("the network is gone")
        self.rows.setdefault(step, {}).update(values)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def close(self) -> None:
        self.closed += 1

    finish = close


@pytest.fixture
def train(text: str, tmp_path: Path) -> Any:
    def call(*words: str) -> Result:
        (tmp_path / "t.txt").write_text(text)
        size = ("--preset", "mini", "--iters", "3", "--batch-size", "2", "--backend", "numpy")
        command = ("train", "--data", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out"))
        return CliRunner().invoke(group, [*command, *size, *words])

    return call


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_logger_is_told_the_rows_of_metrics_jsonl(
    name: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake().install(name, monkeypatch)
    done = train("--log", name)
    assert done.exit_code == 0, done.output
    expected: dict[int, dict[str, float]] = {}
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        expected.setdefault(row.pop("step"), {}).update(row)
    assert fake.rows == expected
    assert fake.closed == 1
    if name != "tensorboard":
        assert (fake.settings["config"]["iters"], fake.settings["name"]) == (3, "out")


def test_a_logger_that_fails_does_not_end_the_run(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Fake(fails_at=2).install("wandb", monkeypatch)
    whole = Fake().install("trackio", monkeypatch)
    done = train("--log", "wandb", "--log", "trackio")
    assert done.exit_code == 0
    assert done.output.count("--log wandb stopped: the network is gone") == 1
    assert (max(broken.rows), max(whole.rows)) == (1, 3)


def test_one_that_is_missing_is_one_line(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, library in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, library, None)
        done = train("--log", name)
        assert done.exit_code == 1
        assert install_command(name) in done.stderr
        assert not list((tmp_path / "out").glob("*.safetensors"))


def test_one_that_cannot_begin_leaves_the_old_run_alone(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train().exit_code == 0
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    Fake(fails_at=0).install("wandb", monkeypatch)
    done = train("--overwrite", "--log", "wandb")
    assert (done.exit_code, "cannot start: no account" in done.stderr) == (1, True)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
