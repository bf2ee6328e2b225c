"""Read the files of a run: `metrics.jsonl` of any length in bounded memory, samples and settings.

The metrics file is read in blocks from its end. The last line gives the number of steps, so every
row goes straight into its bucket. If a resumed run repeated a step, the later line is read first
and is the one that counts.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt import files
from mlx_randygpt.checkpoint import to_strict_json
from mlx_randygpt.config import UserError
from mlx_randygpt.state import Array
from mlx_randygpt.training.reports import EvalLog, Report, StepLog

NAMES = ("loss", "lr", "grad_norm", "tokens_per_second")  # of a step; an evaluation has val_loss
MACHINE_SETTINGS = ("out", "data", "prompt", "threads", "backend")  # not compared between runs
REPORT_SETTINGS = ("eval_every", "sample_every", "save_every", "log_every", "keep_every", "on_nan")
N_BUCKETS = 2048  # per series; more than a picture has columns
MAX_LINE = 1 << 22  # bytes; a longer line is skipped
BLOCK = 1 << 18  # bytes parsed at a time; they fit into a core's cache
_ROW = re.compile(  # a row of `metrics_row`, with floats to nine places
    rb'\{"step": (\d{1,15}), "loss": (\d+\.\d{1,9})\d*, '
    rb'(?:"bits_per_byte": [^,]+, )?"lr": (\d[\d.e-]*), '
    rb'"grad_norm": (\d+\.\d{1,9})\d*, "tokens": \d+, "tokens_per_second": (\d{1,15})\.\d'
)  # a block with any other line is parsed as JSON
_KINDS = (int, float, float, float, int)  # types of its groups; an int parses in half the time
_EVALUATION = b'"val_loss"'


def metrics_row(report: Report, log_every: int) -> dict[str, Any]:
    """Return the row of metrics.jsonl for a report, or {} if it has none; `_ROW` parses it."""
    if isinstance(report, StepLog) and report.step % log_every == 0:
        names = "step loss bits_per_byte lr grad_norm tokens tokens_per_second seconds"
    elif isinstance(report, EvalLog):
        names = "step val_loss perplexity bits_per_byte seconds"
    else:
        return {}
    return {name: to_strict_json(getattr(report, name)) for name in names.split()}


class MetricsError(UserError, ValueError):
    """A folder without readable metrics, or a picture that cannot be written."""


class Series:
    """Values over steps in `N_BUCKETS` buckets, each with its mean, lowest and highest value.

    If there are no more steps than buckets, every value has its own bucket.
    """

    def __init__(self, last_step: int) -> None:
        self._last = max(last_step, 1)
        self.n, self._steps, self._sums = (np.zeros(N_BUCKETS) for _ in range(3))
        self._lows, self._highs = np.full(N_BUCKETS, np.inf), np.full(N_BUCKETS, -np.inf)

    def add(self, steps: Array, values: Array) -> None:
        """Add (n,) values; values that are not finite are skipped."""
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        at = (steps * N_BUCKETS / (self._last + 1)).astype(np.int64)
        self.n += np.bincount(at, minlength=N_BUCKETS)
        self._steps += np.bincount(at, steps, N_BUCKETS)
        self._sums += np.bincount(at, values, N_BUCKETS)
        np.minimum.at(self._lows, at, values)
        np.maximum.at(self._highs, at, values)

    def table(self) -> Array:
        """Return rows of step, mean, lowest and highest, (n, 4), sorted by step."""
        used = self.n > 0
        n = self.n[used]
        columns = (self._steps[used] / n, self._sums[used] / n, self._lows[used], self._highs[used])
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class RunRecord:
    """One run folder: its series as (n, 4) tables of step, mean, lowest, highest; its settings."""

    name: str
    series: dict[str, Array]
    evaluations: list[dict[str, Any]]  # rows with a val_loss, by step
    last: dict[str, Any]  # the last row of a step
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, Any]:
        """Return the evaluation with the lowest validation loss, or {} if there is none."""
        return min(self.evaluations, key=lambda row: float(row["val_loss"]), default={})


def read_run(path: Path) -> RunRecord:
    """Read the run in a folder or metrics file.

    Raises MetricsError if there is none, OSError if a file of it cannot be read.
    """
    file = path / "metrics.jsonl" if files.is_folder(path) else path
    if not files.is_file(file):
        raise MetricsError(f"{file} does not exist; give the folder of a run (train --out)")
    record = read_metrics(file)
    if not record.series["loss"].size and not record.evaluations:
        raise MetricsError(f"{file} holds no steps yet; a run adds a line per step")
    return replace(record, name=str(path))


def runs_below(folders: Iterable[Path], skip: Callable[[str], None]) -> dict[Path, RunRecord]:
    """Return the runs in and below folders by path; `skip` gets the reason for what is left out.

    Raises MetricsError if there is none.
    """
    reasons: list[str] = []

    def unreadable(error: OSError) -> None:
        reasons.append(f"{error.filename} cannot be read: {error.strerror}")
        skip(reasons[-1])

    names = list(folders)
    below = (files.walk(name, lambda entry: not entry.is_symlink(), unreadable) for name in names)
    runs: dict[Path, RunRecord] = {}
    for folder in sorted({p.parent for p in chain(*below) if p.name == "metrics.jsonl"}):
        try:
            runs[folder] = read_run(folder)
        except MetricsError as error:
            skip(str(error))
        except OSError as error:
            unreadable(error)
    if not runs:
        reason = reasons[0] if reasons else "a run is a folder of `mlxgpt train --out`"
        raise MetricsError(f"no run below {', '.join(map(str, names))}; {reason}")
    return runs


def read_metrics(file: Path) -> RunRecord:
    """Read the series, evaluations and settings of one metrics file."""
    series: dict[str, Series] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    earliest = math.inf  # step among the lines read so far, which come later in the file
    for block in _blocks_from_the_end(file):
        table, evaluated = _parse(block)
        for row in reversed(evaluated):
            if math.isfinite(_value(row, "val_loss")):
                evaluations.setdefault(row["step"], row)
        if not table.size:
            continue
        if not last:
            last = _last_row(block)
            series = {name: Series(last["step"]) for name in NAMES}
        table = _drop_repeated(table, earliest)
        earliest = min(earliest, table[0, 0]) if table.size else earliest
        for name, column in zip(NAMES, table.T[1:], strict=True):
            series[name].add(table[:, 0], column)
    tables = {name: series[name].table() if series else np.empty((0, 4)) for name in NAMES}
    end = last.get("step", math.inf)  # a resumed run can be behind the first one
    by_step = [evaluations[step] for step in sorted(evaluations) if step <= end]
    rows = [[row["step"], *[row["val_loss"]] * 3] for row in by_step]
    tables["val_loss"] = np.array(rows, np.float64).reshape(-1, 4)
    folder = files.resolve(file).parent
    return RunRecord(folder.name, tables, by_step, last, _settings(folder / "config.toml"))


def read_samples(file: Path) -> list[dict[str, Any]]:
    """Read the samples of a run: rows of step, prompt and text, sorted by step; [] without a file.

    If a step is repeated, its last row counts. Damaged lines are skipped.
    """
    if not files.is_file(file):
        return []
    samples: list[dict[str, Any]] = []
    for line in reversed(file.read_bytes().split(b"\n")):
        row = _row(line)
        texts = all(isinstance(row.get(name), str) for name in ("prompt", "text"))
        if texts and (not samples or row["step"] < samples[-1]["step"]):
            samples.append(row)
    return samples[::-1]


def differing_settings(records: list[RunRecord]) -> dict[str, list[Any]]:
    """Return setting -> its value in each run (None if absent), for settings that differ.

    Settings that do not affect the trained model come last.
    """
    names = dict.fromkeys(name for record in records for name in record.settings)
    values = {name: [record.settings.get(name) for record in records] for name in names}
    differ = {
        n: v for n, v in values.items() if n not in MACHINE_SETTINGS and any(x != v[0] for x in v)
    }
    return {name: differ[name] for name in sorted(differ, key=lambda name: name in REPORT_SETTINGS)}


def smooth(table: Array, span: float) -> Array:
    """Return the means of `table` (n, 4), smoothed exponentially over `span` steps to both sides.

    Smoothing to both sides keeps the line from lagging behind its values or starting at zero.
    """
    if not len(table) or span <= 0:
        return table[:, 1]
    keep = np.exp(-2 * np.diff(table[:, 0]) / span)
    before, after = (
        _decayed_sums(table[:, 1], keep),
        _decayed_sums(table[::-1, 1], keep[::-1])[::-1],
    )
    total = before + after - np.stack([np.ones(len(table)), table[:, 1]], axis=1)
    return np.asarray(total[:, 1] / total[:, 0])


def _decayed_sums(values: Array, keep: Array) -> Array:
    """Return the decayed sums of weights and of weighted values up to each value, (n, 2)."""
    out = np.stack([np.ones(len(values)), values], axis=1)
    for i, factor in enumerate(keep, start=1):
        out[i] += factor * out[i - 1]
    return out


def _blocks_from_the_end(file: Path) -> Iterator[bytes]:
    """Yield whole lines, about `BLOCK` bytes at a time, from the end of the file."""
    with open(file, "rb") as handle:
        at = handle.seek(0, os.SEEK_END)
        rest: list[bytes] = []  # the end of a line that begins earlier, its last part first
        n_rest = 0
        while at:
            size = min(BLOCK, at)
            at -= size
            handle.seek(at)
            block = handle.read(size)
            cut = block.find(b"\n") + 1
            if at and not cut:  # inside a line that is longer than a block
                n_rest += len(block)
                rest = [*rest, block] if n_rest <= MAX_LINE else []
                continue
            tail = b"".join(reversed(rest)) if n_rest <= MAX_LINE else b"\n"
            if at:
                rest, n_rest = [block[:cut]], cut
                yield block[cut:] + tail
            else:
                yield block + tail


def _parse(block: bytes) -> tuple[Array, list[dict[str, Any]]]:
    """Return steps as (n, 5) of step and `NAMES` in the order of the lines, and the evaluations.

    Lines that are not JSON objects are skipped, such as an incomplete line left by a full disk.
    """
    texts = _ROW.split(block)  # the groups of every row and the text between rows, in one flat list
    table = np.empty((len(texts) // 6, 5))
    evaluations = list(_lines_with(_EVALUATION, block))
    if len(table) + len(evaluations) == block.count(b"\n") and block.endswith(b"\n"):
        for i, kind in enumerate(_KINDS):
            table[:, i] = np.fromiter(map(kind, texts[i + 1 :: 6]), np.float64, len(table))
        return table, [row for line in evaluations if (row := _numbers(line))]
    rows = [row for line in block.split(b"\n") if line and (row := _numbers(line))]
    steps = [[_value(row, n) for n in ("step", *NAMES)] for row in rows if "val_loss" not in row]
    return np.array(steps).reshape(-1, 5), [row for row in rows if "val_loss" in row]


def _lines_with(mark: bytes, block: bytes) -> Iterator[bytes]:
    """Yield the lines that contain `mark`, found with a fast byte search."""
    at = block.find(mark)
    while at >= 0:
        start, end = block.rfind(b"\n", 0, at) + 1, block.find(b"\n", at)
        end = len(block) if end < 0 else end
        yield block[start:end]
        at = block.find(mark, end)


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    valid = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 10**15
    return row if valid else {}


def _numbers(line: bytes) -> dict[str, Any]:
    """Return a row of metrics, with None for each value that is no finite number."""
    row = _row(line)
    return {name: row[name] if math.isfinite(_value(row, name)) else None for name in row}


def _value(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, int | float) and abs(value) < 1e300:
        return float(value)
    return math.nan


def _drop_repeated(table: Array, earliest: float) -> Array:
    """Drop rows whose step appears again later in the file."""
    later = np.append(table[1:, 0], earliest)
    return table[table[:, 0] < np.minimum.accumulate(later[::-1])[::-1]]


def _last_row(block: bytes) -> dict[str, Any]:
    rows = (_numbers(line) for line in reversed(block.split(b"\n")) if line)
    return next(row for row in rows if row and "val_loss" not in row)


def _settings(file: Path) -> dict[str, Any]:
    if not files.is_file(file):
        return {}
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # damaged
        return {}
    return {n: v if isinstance(v, str | int | float | list) else str(v) for n, v in values.items()}
