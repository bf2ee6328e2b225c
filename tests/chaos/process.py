"""One process of a run: its lines as they come, its signals, its end.

Nothing sleeps here: a test goes on at a line on the pipe, or after so many seconds that the process
has outlived.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from threading import Timer
from time import monotonic, time

DEADLINE = 60  # seconds; a process that hangs fails its test


class Life:
    """One process of a run, with its output line by line."""

    def __init__(self, command: list[str], deadline: float = DEADLINE) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        self.lines: list[str] = []
        self.errors = ""
        self.struck_at = 0.0  # by the clock that files have, when the first signal was sent
        self.seconds = -monotonic()  # of its life, once it has ended
        self._watchdog = Timer(deadline, self.process.kill)
        self._watchdog.start()

    def until(self, start: str) -> str:
        """The next line that begins so."""
        for line in self._new_lines():
            if line.startswith(start):
                return line
        raise AssertionError(f"no line {start!r} in {self.lines}: {self.finish().errors}")

    def passes(self, step: int) -> bool:
        """Wait for the line of this step or of a later one; False where none comes."""
        found = (re.match(r"step (\d+)/", line) for line in self._new_lines())
        return any(match and int(match[1]) >= step for match in found)

    def _new_lines(self) -> Iterator[str]:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            yield self.lines[-1]

    def said(self, start: str) -> bool:
        return any(line.startswith(start) for line in self.lines)

    def outlives(self, seconds: float) -> bool:
        """Whether it still runs after so long; it is waited for until then."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return False
        return True

    def send(self, number: int) -> None:
        self.struck_at = self.struck_at or time()
        self.process.send_signal(number)

    def finish(self) -> Life:
        """The process at its end: `code`, all lines and stderr."""
        assert self.process.stdout
        assert self.process.stderr
        # Not `communicate`: it would pass over what iterating has read ahead.
        self.lines += self.process.stdout.read().splitlines()
        self.errors += self.process.stderr.read()
        self.process.wait()
        self.seconds += monotonic()
        self._watchdog.cancel()
        self.process.stdout.close()
        self.process.stderr.close()
        return self

    @property
    def code(self) -> int:
        """The exit code; of a process that a signal ended, what a shell makes of it."""
        code = self.process.returncode
        return 128 - code if code < 0 else code
