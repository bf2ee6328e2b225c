"""What lies at a path, atomic replacement of files and folders, durable flush, reading from pipes.

What pathlib and glob answer for a path that cannot be reached depends on the reason and on the
version of Python: missing, or nothing at all. Here missing is missing, and any other reason is an
OSError with the path. `tests/test_structure.py` holds the package to these functions.

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
import select
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

BUFFER_BYTES = 1 << 20
MAX_NAME = 50  # characters of a file's name that its temporary name repeats; names are limited
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
WRITER_SECONDS = 10  # for a process to open the other end of a pipe
TEMPORARY = re.compile(r"\.(.+?)\.\d+(\.[0-9a-f]{8})?\.tmp")


def flush(descriptor: int) -> None:
    """Flush a file to the disk; on macOS, fsync alone reaches only the cache of the drive."""
    full_flush = getattr(fcntl, "F_FULLFSYNC", None)
    if full_flush is not None:
        with contextlib.suppress(OSError):  # not every file system supports it
            fcntl.fcntl(descriptor, full_flush)
            return
    os.fsync(descriptor)


def open_to_read(path: Path) -> BinaryIO:
    """Open a file or a pipe; raise TimeoutError for a pipe that no process opens for writing."""
    return open(path, "rb", opener=_open_with_writer)


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a small file or of a pipe; raise like `open_to_read`."""
    with open(path, encoding=encoding, opener=_open_with_writer) as file:
        return file.read()


def exists(path: Path) -> bool:
    """Return whether `path` exists, links followed; raise OSError if it cannot be determined."""
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Return whether `path` is a regular file; raise OSError if it cannot be determined."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder; raise OSError if it cannot be determined."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """Return the mode of what lies at `path`, or 0 if nothing does."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except ValueError:  # a NUL or half a character, which no path contains
        return 0


def resolve(path: Path) -> Path:
    """Return the absolute path with links followed; unlike Path.resolve, stop at circular ones."""
    return Path(os.path.realpath(path))


def walk(
    folder: Path,
    enter: Callable[[os.DirEntry[str]], bool],
    on_error: Callable[[OSError], None],
) -> Iterator[Path]:
    """Yield whatever is not a folder below `folder`; `enter` chooses the folders to descend into.

    A folder with several names is read once, under a name without links if it has one. What
    cannot be read is reported to `on_error`, and the rest is read.
    """
    folders, links, seen = [folder], list[Path](), set[tuple[int, int]]()
    while folders or links:
        parent = folders.pop() if folders else links.pop()
        try:
            facts = os.stat(parent)
            entries = [] if (facts.st_dev, facts.st_ino) in seen else _entries(parent)
        except OSError as error:
            on_error(error)
            continue
        seen.add((facts.st_dev, facts.st_ino))
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                on_error(error)
                continue
            if not is_folder:
                yield parent / entry.name
            elif enter(entry):
                (links if entry.is_symlink() else folders).append(parent / entry.name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


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
    with replace(resolve(path), private=private) as file:
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
        if exists(path):
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            if exists(old) and not exists(path):
                old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            if exists(path):
                shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path, name: str = "") -> None:
    """Remove temporary files whose writers have died: those of `name`, or all."""
    with contextlib.suppress(OSError):
        for left in folder.iterdir():
            match = TEMPORARY.fullmatch(left.name)
            if match and name[:MAX_NAME] in ("", match[1]):
                _remove_unlocked(left)


def _open_with_writer(path: str, flags: int) -> int:
    """Return a descriptor as `os.open` does, but do not wait for ever for the writer of a pipe."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode) and not _has_writer(descriptor):
        os.close(descriptor)
        reason = f"it is a pipe that no process has opened for writing in {WRITER_SECONDS} s"
        raise TimeoutError(errno.ETIMEDOUT, f"{reason}; start the writer first", path)
    os.set_blocking(descriptor, True)
    return descriptor


def _has_writer(pipe: int) -> bool:
    """Wait until a pipe has content or an end; return False if nobody opens it in time."""
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    if poller.poll(WRITER_SECONDS * 1000):
        return True
    try:
        os.read(pipe, 1)  # nothing is there to be lost
    except BlockingIOError:  # a writer that has not written yet
        return True
    return False


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
