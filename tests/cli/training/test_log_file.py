"""Lines that wait while a disk refuses them are written once, when it takes them again."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_randygpt.cli.training.folder import LogFile, RunFolder
from mlx_randygpt.training.reports import SampleLog


class FullDisk:
    """A file with room for so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = int(self._file.write(text[: self.room]))
        self.room -= n
        return n


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 1, 9, 12])
def test_a_full_disk_leaves_whole_lines_and_gets_the_others_later(
    tmp_path: Path, room: int
) -> None:
    log = LogFile(tmp_path / "log", fresh=True)
    log.add({"a": 1})
    log.flush()
    disk = log._file = FullDisk(log._file, room)  # type: ignore[assignment]
    log.add({"b": 2})
    log.add({"c": 3})
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            log.flush()
        assert lines(tmp_path / "log") == [{"a": 1}]
        assert len(log) == 2
    disk.room = 1000
    log.add({"d": 4})
    log.close()
    assert lines(tmp_path / "log") == [{"a": 1}, {"b": 2}, {"c": 3}, {"d": 4}]
    assert len(log) == 0


def test_a_fresh_run_empties_it_and_another_goes_on_behind_the_last_whole_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "log").write_text('{"a": 1}\n{"b":')
    log = LogFile(tmp_path / "log", fresh=False)
    log.add({"c": 3})
    log.close()
    assert lines(tmp_path / "log") == [{"a": 1}, {"c": 3}]
    LogFile(tmp_path / "log", fresh=True).close()
    assert (tmp_path / "log").read_bytes() == b""


def test_a_run_tells_once_that_lines_wait_and_once_that_they_are_written(tmp_path: Path) -> None:
    report = SampleLog(step=1, text="so it goes", prompt="so")
    with RunFolder(tmp_path) as folder:
        folder.begin("", fresh=True)
        samples = folder.logs._files[1]
        disk = samples._file = FullDisk(samples._file, 0)  # type: ignore[assignment]
        for _ in range(3):
            folder.logs.record(report, 1)
        told = "metrics.jsonl and samples.jsonl"
        assert folder.news == [f"{told} wait in memory: No space left on device."]
        assert folder.logs.unwritten() == f"3 lines of {told} are lost: No space left on device"
        disk.room = 10_000
        folder.logs.record(report, 1)
        assert folder.news[1:] == [f"{told} are written again, with every line."]
        assert folder.logs.unwritten() == ""
    assert len(lines(tmp_path / "samples.jsonl")) == 4
