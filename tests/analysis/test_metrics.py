"""What a run left behind, read again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from metrics_files import evaluation, row, write

from mlx_randygpt.analysis import metrics
from mlx_randygpt.analysis.metrics import (
    MetricsError,
    differing_settings,
    metrics_row,
    read_run,
    read_samples,
    smooth,
)
from mlx_randygpt.training.reports import EvalLog, StepLog


def test_every_row_of_a_short_run_is_a_point(tmp_path: Path) -> None:
    losses = np.random.default_rng(1).uniform(1, 4, 300)
    run = read_run(write(tmp_path / "a", "".join(map(row, range(1, 301), losses))))
    np.testing.assert_allclose(run.series["loss"][:, 0], np.arange(1, 301))
    np.testing.assert_allclose(run.series["loss"][:, 1], losses, rtol=1e-9)
    np.testing.assert_allclose(run.series["lr"][:, 3], 0.01 / np.arange(1, 301))
    assert run.last["tokens"] == 64 * 300


def test_every_row_of_a_long_run_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 5000)
    losses = np.random.default_rng(1).uniform(1, 4, 9000)
    losses[[10, 7000]] = 0.5, 99.0
    table = read_run(write(tmp_path / "a", "".join(map(row, range(1, 9001), losses)))).series[
        "loss"
    ]
    assert len(table) == metrics.N_BUCKETS
    assert (table[:, 2].min(), table[:, 3].max()) == (0.5, 99.0)
    n = np.bincount((np.arange(1, 9001) * metrics.N_BUCKETS / 9001).astype(int))
    assert table[:, 1] @ n / 9000 == pytest.approx(losses.mean())


@pytest.mark.parametrize("size", [100, 1 << 18])
def test_of_a_step_taken_twice_the_later_line_counts(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK", size)
    first = [row(s, 3.0) for s in range(1, 21)]
    first[9] += evaluation(10, 3.3)
    first[19] += evaluation(20, 1.1)
    again = [row(s, 2.0) for s in range(13, 18)]
    run = read_run(write(tmp_path / "a", "".join(first + again)))
    assert run.series["loss"][:, :2].tolist() == [[s, 3.0 if s < 13 else 2.0] for s in range(1, 18)]
    assert [found["step"] for found in run.evaluations] == [10]


def test_torn_lines_and_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    strange = row(2, math.nan) + row(3, math.inf) + row(4, 1.0).replace("1.0", "null", 1)
    text = row(1, 4.0) + strange + row(5, 2.0) + evaluation(5, math.nan) + "[1]\nnonsense\n"
    text += "[" * 99999 + "\n" + row(9, 1.0).replace("9", "9" * 400, 1) + row(5, 2.0, lr=10**400)
    run = read_run(write(tmp_path / "a", text + row(6, 1.0)[:40]))
    assert run.series["loss"][:, :2].tolist() == [[1, 4.0], [5, 2.0]]
    assert run.series["lr"][:, 0].tolist() == [1, 2, 3, 4]
    assert run.evaluations == []


def test_rows_of_a_run_are_read_without_json() -> None:
    """Else a million rows take four times as long."""
    logs = [StepLog(1, 2.1234567890123, 0.01, 11.5, 64, 1000.5, 0.5, 0),
            StepLog(2, 0.5, 6.6e-05, 0.25, 128, 99999.0, 1e-05, 0),
            EvalLog(2, 1.25, 1.8, 1.25, 2, 0.5)]  # fmt: skip
    text = "".join(json.dumps(metrics_row(log, 1)) + "\n" for log in logs).encode()
    table, evaluations = metrics._parse(text)
    assert len(metrics._ROW.findall(text)) == len(table) == 2
    assert table.tolist() == [[1, 2.123456789, 0.01, 11.5, 1000], [2, 0.5, 6.6e-05, 0.25, 99999]]
    assert [found["val_loss"] for found in evaluations] == [1.25]


def test_of_samples_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    def line(step: int, text: str) -> str:
        return json.dumps({"step": step, "prompt": "A", "text": text}) + "\n"

    file = tmp_path / "samples.jsonl"
    assert read_samples(file) == []
    lines = [line(1, "a"), line(5, "b"), line(9, "c"), "[1]\n", '{"step": 7}\n', line(5, "d")]
    file.write_text("".join(lines) + line(7, "e")[:20])
    assert [(row["step"], row["text"]) for row in read_samples(file)] == [(1, "a"), (5, "d")]


def test_a_smoothed_line_keeps_a_constant_and_the_middle_of_a_slope() -> None:
    steps = np.arange(100.0)
    level = np.stack([steps, *[np.full(100, 3.0)] * 3], axis=1)
    slope = np.stack([steps] * 4, axis=1)
    np.testing.assert_allclose(smooth(level, 10), 3.0)
    np.testing.assert_allclose(smooth(slope, 10)[50], 50.0, rtol=1e-4)


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    a = read_run(write(tmp_path / "a", row(1, 1.0), 'lr = 0.1\nseed = 1\nout = "a"\n'))
    b = read_run(write(tmp_path / "b", row(1, 1.0), 'lr = 0.2\nseed = 1\nout = "b"\nnew = true\n'))
    assert differing_settings([a, b]) == {"lr": [0.1, 0.2], "new": [None, True]}


@pytest.mark.parametrize("content", [None, "", "{}\n"])
def test_a_folder_without_reports_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(MetricsError, match=r"metrics\.jsonl"):
        read_run(tmp_path)
