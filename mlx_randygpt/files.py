"""What is written is on the disk: the calls that make it so, on Linux and on macOS."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def flush(descriptor: int) -> None:
    """To the disk itself: the fsync of macOS leaves what is written in the cache of the drive."""
    everything = getattr(fcntl, "F_FULLFSYNC", None)
    if everything is not None:
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, everything)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
