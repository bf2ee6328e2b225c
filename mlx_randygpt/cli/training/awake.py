"""A Mac that trains stays awake; its display does not, because a lit one can stop the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import TracebackType


class KeepAwake:
    """Context manager in which macOS does not sleep; `note` says so, or why it might sleep.

    macOS ends `caffeinate` when this process ends, however it ends. `-s` holds on mains power only.
    """

    def __init__(self, allow_sleep: bool = False) -> None:
        self._wanted = sys.platform == "darwin" and not allow_sleep
        self._process: subprocess.Popen[bytes] | None = None
        self.note = ""

    def __enter__(self) -> KeepAwake:
        if self._wanted:
            command = ["caffeinate", "-is", "-w", str(os.getpid())]
            quiet = subprocess.DEVNULL
            try:
                self._process = subprocess.Popen(
                    command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
                )
                self.note = "The Mac stays awake during the run; --allow-sleep lets it sleep."
            except OSError as error:
                self.note = f"The Mac may sleep during the run: caffeinate: {error.strerror}."
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
