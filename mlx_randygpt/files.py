"""Atomic replacement of files and folders, and a flush that reaches the disk.

New content goes to a temporary file in the same folder, `.NAME.PID.RANDOM.tmp`, which its writer
keeps locked. Such a file without a lock was left by a process that died; `sweep` removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BUFFER_BYTES = 1 << 20
MAX_NAME = 50  # characters of a file's name that its temporary name repeats; names are limited
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
TEMPORARY = re.compile(r"\.(.+?)\.\d+(\.[0-9a-f]{8})?\.tmp")


def flush(descriptor: int) -> None:
    """Flush a file to the disk; on macOS, fsync alone reaches only the cache of the drive."""
    full_flush = getattr(fcntl, "F_FULLFSYNC", None)
    if full_flush is not None:
        with contextlib.suppress(OSError):  # not every file system supports it
            fcntl.fcntl(descriptor, full_flush)
            return
    os.fsync(descriptor)


def exists(path: Path) -> bool:
    """Return whether `path` exists; unlike Path.exists, raise OSError if that is unknown."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_at(descriptor: int, start: int, n: int) -> bytes:
    """Return n bytes from `start`, fewer only at the end; one read of the system can be short."""
    parts = list[bytes]()
    while n and (part := os.pread(descriptor, n, start)):
        parts.append(part)
        start, n = start + len(part), n - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    _flush_path(folder)


@contextlib.contextmanager
def replace(
    path: Path, *, previous: Path | None = None, private: bool = False
) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` at the end of the block, once it is on the disk.

    If the block raises, `path` is unchanged and the new file is removed. With `previous`, the old
    content stays under that name. With `private`, only this user can read the file.
    """
    sweep(path.parent, path.name)
    temporary, descriptor = _create(path, 0o600 if private else 0o666)
    try:
        with open(descriptor, "wb", buffering=BUFFER_BYTES) as file:
            yield file
            file.flush()
            flush(file.fileno())
            if previous is not None and exists(path):
                _link(path, previous)
            try:
                publish(temporary, path)
            except OSError:
                if previous is not None and not exists(path):  # moved, without hard links
                    os.replace(previous, path)
                raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Rename a flushed file to `path`, and flush the folder."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace the file at `path` by `content`; follow links, write to devices and pipes."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        path.write_bytes(content)
        return
    with replace(Path(os.path.realpath(path)), private=private) as file:
        file.write(content)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `path` and its files at the end of the block.

    If the process is killed between the two renames, the old folder stays as `.NAME.….old`.
    """
    sweep(path.parent, path.name)
    temporary = _temporary_path(path, "tmp")
    old = _temporary_path(path, "old")
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield temporary
        for file in temporary.iterdir():
            _flush_path(file)
        sync_folder(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            if old.exists() and not path.exists():
                old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path, name: str = "") -> None:
    """Remove temporary files whose writers have died: those of `name`, or all."""
    with contextlib.suppress(OSError):
        for left in folder.iterdir():
            match = TEMPORARY.fullmatch(left.name)
            if match and name[:MAX_NAME] in ("", match[1]):
                _remove_unlocked(left)


def _remove_unlocked(left: Path) -> None:
    with contextlib.suppress(OSError):
        kind = left.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            return
        access = os.O_RDONLY if stat.S_ISDIR(kind) else os.O_RDWR
        descriptor = os.open(left, access | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(
                descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # fails while its writer holds the lock
            if stat.S_ISDIR(kind):
                shutil.rmtree(left)
            else:
                left.unlink()
        finally:
            os.close(descriptor)


def _create(path: Path, mode: int) -> tuple[Path, int]:
    """Create a temporary file for `path` and lock it; return its path and descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = _temporary_path(path, "tmp")
        descriptor = os.open(temporary, flags, mode)
        try:
            _lock(descriptor)
            if exists(temporary):  # otherwise another process removed it before the lock
                return temporary, descriptor
        except OSError:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        os.close(descriptor)


def _temporary_path(path: Path, suffix: str) -> Path:
    name = f".{path.name[:MAX_NAME]}.{os.getpid()}.{secrets.token_hex(4)}.{suffix}"
    return path.with_name(name)


def _lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: `sweep` cannot lock either
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _flush_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path, other: Path) -> None:
    """Link `path` to `other` so that one of the two names exists at every moment."""
    link = _temporary_path(other, "tmp")
    try:
        os.link(path, link)
        os.replace(link, other)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(path, other)
    finally:
        with contextlib.suppress(OSError):
            link.unlink()  # it still exists if `other` was the same file
