"""A file of JSON lines that loses none while its disk refuses: they wait in memory."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

MAX_LINE = 1 << 20  # bytes; a line of metrics has about 200, a sample rarely 4,000


class LogFile:
    """Lines at the end of a file, which is emptied for a fresh run, and loses a torn last line for
    one that goes on. OSError where it cannot be opened."""

    def __init__(self, path: Path, fresh: bool) -> None:
        if not fresh and path.exists():
            _drop_torn_line(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if fresh:
            self._file.truncate(0)
        self._waiting: list[str] = []

    def __len__(self) -> int:
        """Lines that wait."""
        return len(self._waiting)

    def add(self, values: object) -> None:
        """One line, which the next `flush` writes."""
        self._waiting.append(json.dumps(values) + "\n")

    def flush(self) -> None:
        """Write the lines that wait; OSError leaves all of them waiting, and the file without
        them."""
        text = memoryview("".join(self._waiting).encode())
        size = os.fstat(self._file.fileno()).st_size
        try:
            while text:
                text = text[self._file.write(text) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Write what waits, if that is possible, and no more."""
        with contextlib.suppress(OSError):
            self.flush()
        self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off what a lost machine left of a last line."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_LINE))
        tail = file.read()
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
