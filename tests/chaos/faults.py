"""What can go wrong around a process of a run, and what becomes of the files of a dead one."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path

from process import Life


def kill(life: Life) -> None:
    life.send(signal.SIGKILL)
    life.finish()


def freeze(life: Life) -> None:
    """Stop the process as a laptop that sleeps does; returns when it stands still."""
    life.send(signal.SIGSTOP)
    os.waitpid(life.process.pid, os.WUNTRACED)


def fill_disk(life: Life) -> None:
    """No file of the process can grow past 4,096 bytes, a tenth of a checkpoint."""
    resource.prlimit(life.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def free_disk(life: Life) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(life.process.pid, resource.RLIMIT_FSIZE, unlimited)


def bound_by_permissions() -> list[str] | None:
    """What a command is started under so that a read-only folder is one to root as well; None
    where that cannot be."""
    if os.geteuid() != 0:
        return []
    without = "--bounding-set=-dac_override,-dac_read_search"
    return ["setpriv", without] if shutil.which("setpriv") else None


def remove(folder: Path) -> None:
    """Take the folder away in one moment, whatever is being written in it."""
    aside = folder.with_name("removed")
    folder.rename(aside)
    shutil.rmtree(aside)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """What a file system may leave of a file whose data never reached the disk."""
    os.truncate(path, 0)


def zero(path: Path) -> None:
    """The right length and nothing in it, as after a power cut without fsync."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    """One bit of a weight in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"truncated": truncate, "empty": empty, "zeros": zero, "one bit": flip}
