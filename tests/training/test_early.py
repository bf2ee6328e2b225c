"""Early looks: when they come, what they cost, and that a run is the same with and without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.analysis.metrics import metrics_row
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.checkpoint import NEWEST, load_checkpoint
from mlx_randygpt.config import ConfigError, TrainConfig
from mlx_randygpt.training.early import (
    COST_SECONDS,
    FORWARD_SPEED,
    KINDS,
    EarlyLooks,
    early_kinds,
)
from mlx_randygpt.training.evaluation import Score
from mlx_randygpt.training.loop import EVAL_TOKENS, Run, Trainer, train
from mlx_randygpt.training.reports import EarlyEvalLog, EarlySampleLog, Report, SaveLog, StepLog

Make = Callable[..., tuple[Run, Backend]]
Early = EarlyEvalLog | EarlySampleLog


def ticking(backend: Backend, seconds: float = 5.0) -> Callable[[], float]:
    """A clock on which each step takes so long, and nothing else any time."""
    return lambda: seconds * backend.step


def early_steps(reports: list[Report], kind: type[Any] = EarlyEvalLog) -> list[int]:
    return [report.step for report in reports if isinstance(report, kind)]


def without_times(report: Report) -> Report:
    if isinstance(report, StepLog):  # a look reads its step at once
        return replace(report, seconds=0, tokens_per_second=0, memory_bytes=0)
    return report


def test_looks_come_ever_rarer_until_a_regular_one_comes(make_run: Make) -> None:
    run, backend = make_run("modern", iters=40, eval_every=20)
    reports = list(train(run, backend, clock=ticking(backend), early=KINDS))
    # The first step is read after the second, at 10 s. So looks are due at 30, 50, 90 and 170 s.
    assert early_steps(reports) == [6, 10, 18]
    assert early_steps(reports, EarlySampleLog) == [6, 10, 18, 34]  # no regular sample before
    waits = [report.next_seconds for report in reports if isinstance(report, EarlySampleLog)]
    assert waits == [20, 40, 80, 160]


def test_a_save_at_every_step_does_not_crowd_looks_out(make_run: Make, tmp_path: Path) -> None:
    run, backend = make_run("modern", iters=8, save_every="1")
    reports = list(train(run, backend, tmp_path, clock=ticking(backend), early=["sample"]))
    assert early_steps(reports, EarlySampleLog) == [5]  # each step is read at once
    assert early_steps(reports) == []


@pytest.mark.parametrize("early_loss", [0.0, 99.0])  # as a best, or as one without a new best
@pytest.mark.parametrize("name", ["numpy", "mlx"])
def test_a_run_is_the_same_with_and_without_looks(
    name: str, early_loss: float, make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "mlx":
        pytest.importorskip("mlx.core", exc_type=ImportError)
    exact = Trainer._score

    def score(self: Trainer, max_tokens: int) -> Score | None:
        real = exact(self, max_tokens)
        return replace(real, loss=early_loss) if real and max_tokens < EVAL_TOKENS else real

    monkeypatch.setattr(Trainer, "_score", score)
    settings = {"schedule": "plateau", "patience": 1, "eval_every": 8, "sample_every": 20}
    told, states = [], []
    for early in ((), KINDS):
        run, backend = make_run("modern", name, model={"dropout": 0.1}, iters=24, **settings)
        out, clock = tmp_path / str(len(early)), ticking(backend)
        reports = list(train(run, backend, out, clock=clock, early=early))
        told.append([without_times(r) for r in reports if not isinstance(r, Early | SaveLog)])
        states.append(load_checkpoint(out / NEWEST))
        shown = {r.val_loss for r in reports if isinstance(r, EarlyEvalLog)}
        assert shown == ({early_loss} if early else set())
    assert told[0] == told[1]
    np.testing.assert_equal(asdict(states[0].state), asdict(states[1].state))
    assert states[0].progress == states[1].progress


def test_looks_are_not_written(make_run: Make) -> None:
    run, backend = make_run("modern", iters=8)
    reports = list(train(run, backend, clock=ticking(backend), early=KINDS))
    early = [report for report in reports if isinstance(report, Early)]
    assert len(early) == 2
    assert [metrics_row(report, 1) for report in early] == [{}, {}]


def test_an_early_evaluation_reads_what_the_speed_allows(make_run: Make) -> None:
    looks = EarlyLooks(KINDS, float)
    assert looks.n_tokens(100.0) == 100 * COST_SECONDS * FORWARD_SPEED
    assert looks.n_tokens(999.0) == looks.n_tokens(100.0)  # the same windows every time
    run, backend = make_run("modern", iters=7)
    n_step = run.train.sequences_per_step * run.model.block_size
    hours = 2e4 * n_step  # seconds of a step
    reports = list(train(run, backend, clock=ticking(backend, hours), early=["evaluation"]))
    looked = [r.tokens for r in reports if isinstance(r, EarlyEvalLog)]
    assert set(looked) == {run.model.block_size}  # one window


def test_an_early_sample_ends_with_its_time(make_run: Make) -> None:
    run, backend = make_run("modern", iters=8)
    clock, asked = ticking(backend), 0

    def slow() -> float:
        nonlocal asked
        asked += backend.step >= 6
        return clock() + 0.2 * asked

    reports = list(train(run, backend, clock=slow, early=["sample"]))
    [early] = [report for report in reports if isinstance(report, EarlySampleLog)]
    assert 1 <= len(early.text) <= 4  # 0.5 s after the first token, at 0.2 s each


def test_a_stop_ends_a_look(make_run: Make) -> None:
    run, backend = make_run("modern", iters=20)
    reports = train(run, backend, None, lambda: backend.step >= 6, ticking(backend), early=KINDS)
    assert [r for r in reports if isinstance(r, Early)] == []


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'samples' is unknown; it is one of evaluation, sample"):
        EarlyLooks(["samples"], float)


def test_an_interval_that_was_given_keeps_its_own_schedule() -> None:
    usual = TrainConfig()
    assert early_kinds(usual, {}) == {"evaluation", "sample"}
    assert early_kinds(usual, {"eval_every": 250}) == {"sample"}
    assert early_kinds(replace(usual, sample_every=0), {"seed": 1}) == {"evaluation"}
