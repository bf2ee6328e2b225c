"""metrics.jsonl with odd or huge lines: the run is listed without those values, in linear time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_randygpt.analysis import metrics
from mlx_randygpt.analysis.metrics import read_metrics
from mlx_randygpt.cli import group

ROWS = "".join(
    f'{{"step": {i}, "loss": 2.5, "lr": 0.001, "grad_norm": 1.0, "tokens": {i}, '
    '"tokens_per_second": 10.0, "seconds": 1.0}\n'
    for i in range(1, 61)
)
EVALUATION = '{"step": 60, "val_loss": 2.25, "perplexity": 9.0, "seconds": 1.0}\n'
ODD = [
    '{"step": 61, "loss": "b"}', '{"step": 61, "loss": [1]}', '{"step": 61, "loss": null}',
    '{"step": 61, "loss": NaN}', '{"step": 61, "loss": 1e999, "seconds": "long"}',
    '{"step": 61, "loss": true, "tokens": {}, "seconds": []}', '{"step": 61, "seconds": null}',
    '{"step": 61, "val_loss": "x"}', '{"step": 60, "val_loss": 2.0, "seconds": "x"}',
    '{"step": "61"}', '{"step": -1, "loss": 1}', '{"step": 1e9}', '{"step": true}', "[1]", "null",
    "1", '"x"', "{", "[" * 100_000, "\0", "\ufeff{}", '{"step": ' + "9" * 5000 + "}",
]  # fmt: skip


def runs(folder: Path) -> list[dict[str, Any]]:
    """Return what `mlxgpt runs --json` prints."""
    done = CliRunner().invoke(group, ["runs", "--json", str(folder)])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(group, ["runs", str(folder)])
    assert shown.exit_code == 0, shown.output
    listed: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    return listed


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", ["end", "middle"])
def test_a_run_with_an_odd_line_is_listed(tmp_path: Path, odd: str, where: str) -> None:
    for name in ("good", "odd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(ROWS + EVALUATION)
    path = tmp_path / "odd" / "metrics.jsonl"
    path.write_text(
        f"{ROWS}{EVALUATION}{odd}\n" if where == "end" else f"{odd}\n{ROWS}{EVALUATION}"
    )
    rows = {Path(row["run"]).name: row for row in runs(tmp_path)}
    assert rows["good"]["train_loss"] == 2.5
    assert rows["odd"]["best_loss"] in (2.25, 2.0)
    assert rows["odd"]["train_loss"] in (2.5, None)
    done = CliRunner().invoke(group, ["plot", str(tmp_path / "odd")])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("odd", ["a = 1979-05-27", "a = {b = 1}", "a = nan", "a = [{}]", "\0", "="])
def test_odd_settings_do_not_end_the_table(tmp_path: Path, odd: str) -> None:
    for name in ("good", "odd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(ROWS + EVALUATION)
        (tmp_path / name / "config.toml").write_text("a = 1\n" if name == "good" else odd)
    assert len(runs(tmp_path)) == 2


@pytest.mark.parametrize("n", [1, 100, 1000, 5000, 100_000])
@pytest.mark.parametrize("where", [0, 30, 60])
def test_lines_longer_than_a_block_are_read_or_skipped(
    tmp_path: Path, n: int, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 512)
    monkeypatch.setattr(metrics, "MAX_LINE", 4096)
    lines = ROWS.splitlines(keepends=True)
    lines.insert(where, f'{{"step": {where}, "val_loss": 1.5, "x": "{"y" * n}"}}\n')
    (path := tmp_path / "metrics.jsonl").write_text("".join(lines))
    record = read_metrics(path)
    assert record.series["loss"][:, 0].tolist() == [*range(1, 61)]
    assert len(record.evaluations) == (n < 4096)


def test_a_huge_line_takes_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    seconds = []
    for n in (25, 100):
        path.write_text(ROWS + '{"step": 61, "x": "' + "y" * (n << 20) + '"}\n' + EVALUATION)
        began = time.process_time()
        assert len(read_metrics(path).evaluations) == 1
        seconds.append(time.process_time() - began)
    assert seconds[1] < 8 * seconds[0] + 0.5
