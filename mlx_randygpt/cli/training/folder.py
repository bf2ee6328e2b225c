"""The output folder of a run: its lock, its place if it is moved, its logs and checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from io import FileIO
from pathlib import Path

from mlx_randygpt import files
from mlx_randygpt.analysis.metrics import metrics_row
from mlx_randygpt.checkpoint import (
    BEST,
    NEWEST,
    Checkpoint,
    CheckpointError,
    Position,
    UnreadableError,
    load_checkpoint,
    peek_position,
    position_of,
    serialize,
    write_atomically,
)
from mlx_randygpt.config import UserError
from mlx_randygpt.training.reports import EvalLog, Report, SampleLog

FLUSH_SECONDS = 1.0
MAX_LINE = 1 << 20  # bytes read at a time; a line has about 200, a sample rarely 4,000
CHECKPOINT = re.compile(r"checkpoint.*\.safetensors", re.DOTALL)
LOCK = ".lock"
MAX_OWNER = 100  # bytes read of a lock
OWNER = re.compile(rb"\s*(\d{0,20})\s*")  # what a lock holds: the number of its process, or nothing
NOWHERE = Position(-1, -1)  # below all others
SAMPLES = "samples.jsonl"  # private: it can repeat the text
LOGS = ("metrics.jsonl", SAMPLES)
LOG_NAMES = " and ".join(LOGS)


class FolderError(UserError, OSError):
    """An output folder that cannot be used."""


class FolderInUse(FolderError):
    """An output folder that another run has locked."""


class RunFolder:
    """Context manager that locks an output folder; the lock ends with the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.news: list[str] = []  # messages about the folder that were not shown yet
        self.logs = RunLogs(self.news.append)
        self._config_toml: str | None = None  # None until a run has begun here

    def __enter__(self) -> RunFolder:
        parts = (self.path / LOCK, self.path, *self.path.parents)
        try:
            self._created = [part for part in parts if not files.exists(part)]
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._lock = lock_folder(self.path)
        files.sweep(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.logs.close()
        with contextlib.suppress(OSError):
            self._lock.truncate(0)
            if self._config_toml is None:  # refused: leave no trace
                for path in self._created:
                    path.unlink() if path.name == LOCK else path.rmdir()
        self._lock.close()

    def locate(self) -> Path:
        """Return where the folder is now: follow it if it was moved, restore it if removed.

        A folder that cannot be reached stays: saving reports the reason and tries again.
        """
        with contextlib.suppress(OSError):
            old = self.path
            if not is_at(self._lock, old / LOCK):
                if lock_path := current_path(self._lock):
                    self.path = lock_path.parent
                    self.news.append(f"{old} was moved; this run continues in {self.path}.")
                else:
                    self._recreate()
        return self.path

    def _recreate(self) -> None:
        """Create the folder again, or one beside it if the name is another run's or no folder's."""
        old, path = self.path, self.path
        try:
            lock = lock_folder(path)
        except FolderError as error:
            if not isinstance(error.__cause__, BlockingIOError | FileExistsError):
                raise
            path = old.with_name(f"{old.name}-{os.getpid()}")
            lock = lock_folder(path)
        self.path = path
        try:
            if self._config_toml is not None:
                self.begin(self._config_toml, fresh=False)
        except FolderError:
            self.path = old
            lock.close()
            raise
        self._lock.close()
        self._lock = lock
        self.news.append(f"{old} was removed; this run continues in {path}, created again.")

    def begin(self, config_toml: str, *, fresh: bool) -> None:
        """Write config.toml and open the logs.

        A fresh run empties the logs and removes another run's checkpoints, except the newest,
        which its own first one replaces.
        """
        try:
            for old in list_checkpoints(self.path) if fresh else ():
                if old.name != NEWEST:
                    old.unlink()
            settings = self.path / "config.toml"
            settings.unlink(missing_ok=True)  # it may be a link to another file
            with open_own(settings, os.O_EXCL) as file:
                file.write(config_toml.encode(errors="replace"))
            self.logs.open(self.path, fresh=fresh)
            with contextlib.suppress(OSError):  # a disk that refuses is reported by the first save
                files.sync_folder(self.path)
            self._config_toml = config_toml
        except OSError as error:
            name = error.filename or self.path
            raise FolderError(f"{name} cannot be written: {error.strerror}") from error


class RunLogs:
    """metrics.jsonl and samples.jsonl of a run; lines wait in memory while the disk is full.

    One thread records and flushes; another can call `sync`, which no `record` waits for.
    """

    def __init__(self, note: Callable[[str], object]) -> None:
        self._note = note
        self._problem = ""  # why lines wait
        self._flushed_at = time.monotonic()
        self._files: list[LogFile] = []  # one for each of LOGS
        self._writing = threading.RLock()

    def open(self, folder: Path, *, fresh: bool) -> None:
        """Open both files; a fresh run begins new ones, and the lines of open ones are copied."""
        with self._writing, contextlib.ExitStack() as on_error:
            opened = list[LogFile]()
            for name in LOGS:
                opened.append(LogFile(folder / name, fresh))
                on_error.callback(opened[-1].close)
            for old, new in zip(self._files, opened, strict=False):
                new.replace(old)
            on_error.pop_all()
            self._files = opened

    def record(self, report: Report, log_every: int) -> None:
        """Append the line of a report, if it has one; it is written within about a second."""
        metrics, samples = self._files
        if row := metrics_row(report, log_every):
            metrics.add(row)
        if isinstance(report, SampleLog):
            samples.add(asdict(report))
        is_old = time.monotonic() - self._flushed_at > FLUSH_SECONDS
        is_due = is_old or isinstance(report, EvalLog | SampleLog)
        if is_due and self._writing.acquire(blocking=False):
            try:
                self.flush()
            finally:
                self._writing.release()

    def flush(self) -> None:
        """Write the waiting lines; report once that a disk refuses them, and once when it stops."""
        with self._writing:
            self._flushed_at = time.monotonic()
            self._try_each(LogFile.flush)

    def sync(self) -> None:
        """Put every recorded line on the disk; raise OSError if that fails."""
        with self._writing:
            self._try_each(LogFile.sync)
            if self._problem:
                raise OSError(self._problem)

    def _try_each(self, write: Callable[[LogFile], None]) -> None:
        before, self._problem = self._problem, ""
        for file in self._files:
            try:
                write(file)
            except OSError as error:
                self._problem = error.strerror or str(error)
        if self._problem and not before:
            self._note(f"{LOG_NAMES} wait in memory: {self._problem}.")
        elif before and not self._problem:
            self._note(f"{LOG_NAMES} are written again, with every line.")

    def unwritten(self) -> str:
        """Return a message about the lines that could not be written, or ""."""
        n_lines = sum(map(len, self._files))
        return f"{n_lines} lines of {LOG_NAMES} are lost: {self._problem}" if n_lines else ""

    def close(self) -> None:
        """Write what waits, if possible, and close the files."""
        with self._writing:
            for file in self._files:
                file.close()


class LogFile:
    """A file of JSON lines to append to; opening it raises OSError.

    A fresh run begins a new file; a resumed one removes an incomplete last line.
    """

    def __init__(self, path: Path, fresh: bool) -> None:
        if fresh:
            path.unlink(missing_ok=True)
        self._file = open_own(path, os.O_APPEND, 0o600 if path.name == SAMPLES else 0o666)
        _drop_torn_line(self._file)
        self._waiting: list[bytes] = []
        self._synced = os.fstat(self._file.fileno()).st_size  # bytes that are on the disk
        self._sync_failed = False

    def __len__(self) -> int:
        """Return the number of waiting lines."""
        return sum(lines.count(b"\n") for lines in self._waiting)

    def replace(self, old: LogFile) -> None:
        """Take over the content and the waiting lines of a file that was removed."""
        self._file.truncate(0)
        old._file.seek(0)
        while content := old._file.read(MAX_LINE):
            self._waiting = [content]
            self.flush()
        self._waiting = old._waiting
        old._file.close()

    def add(self, values: object) -> None:
        """Add a line for the next `flush`."""
        self._waiting.append(json.dumps(values).encode() + b"\n")

    def flush(self) -> None:
        """Write the waiting lines; on OSError all of them stay waiting and none is in the file."""
        n = len(self._waiting)  # another thread can add more meanwhile
        content = memoryview(b"".join(self._waiting[:n]))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise
        del self._waiting[:n]

    def sync(self) -> None:
        """Write the waiting lines and flush the file to the disk; raise OSError if that fails."""
        descriptor = self._file.fileno()
        if self._sync_failed:  # the system may take for written what is not: write it again
            size = os.fstat(descriptor).st_size
            unsure = files.read_at(descriptor, self._synced, size - self._synced)
            self._file.truncate(self._synced)
            self._waiting.insert(0, unsure)
            self._sync_failed = False
        self.flush()
        try:
            files.flush(descriptor)
        except OSError:
            self._sync_failed = True
            raise
        self._synced = os.fstat(descriptor).st_size

    def close(self) -> None:
        """Write what waits, if possible, and close the file."""
        with contextlib.suppress(OSError):
            self.flush()
        self._file.close()


def open_own(path: Path, flags: int = 0, mode: int = 0o666) -> FileIO:
    """Open or create a file of the folder to read and write; OSError if it is a link or no file."""
    flags |= os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it is a link; remove it", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file; remove it", str(path))
    return FileIO(descriptor, "ab+" if flags & os.O_APPEND else "rb+")


def _drop_torn_line(file: FileIO) -> None:
    """Remove an incomplete last line left by a crash."""
    at = file.seek(0, os.SEEK_END)
    while at:
        n = min(at, MAX_LINE)
        at -= n
        end = files.read_at(file.fileno(), at, n).rfind(b"\n") + 1
        if end:
            break
    else:
        end = 0
    file.truncate(at + end)


# Checkpoints in a folder


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder: checkpoint.safetensors first, then by their names."""
    try:
        with os.scandir(folder) as entries:  # glob would pass over a folder that it cannot read
            names = [entry.name for entry in entries if CHECKPOINT.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise FolderError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    return [folder / name for name in sorted(names, key=lambda name: (name != NEWEST, name))]


def refuse_checkpoints(
    folder: Path,
    advice: str = "--resume continues that run, --overwrite replaces it, --out DIR uses another "
    "folder",
) -> None:
    """Raise FolderError if a run would overwrite another one's checkpoints."""
    if paths := list_checkpoints(folder):
        raise FolderError(f"{folder} already holds a checkpoint ({paths[0].name}); {advice}")


def newest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Return the valid checkpoint of the highest position, and a line for each damaged file.

    This is the checkpoint of a bare --resume; clocks and times of files do not count. Of several
    at one position it is checkpoint.safetensors. Raises CheckpointError if there is none, or if
    the system does not let one be read: it can be the furthest.
    """
    paths = list_checkpoints(folder)
    if not paths:
        raise CheckpointError(no_checkpoint(folder))
    positions, skipped = dict[Path, Position](), list[str]()
    for path in paths:
        try:
            positions[path] = peek_position(path)
        except UnreadableError as error:
            raise _cannot_choose(error) from error
        except CheckpointError as error:
            skipped.append(f"Skipped: {error}")
    for path in sorted(positions, key=positions.__getitem__, reverse=True):
        try:
            return load_checkpoint(path), skipped
        except UnreadableError as error:
            raise _cannot_choose(error) from error
        except CheckpointError as error:
            skipped.append(f"Skipped: {error}")
    reasons = "; ".join(line.removeprefix("Skipped: ") for line in skipped)
    raise CheckpointError(f"no checkpoint in {folder} can be read: {reasons}")


def _cannot_choose(error: UnreadableError) -> CheckpointError:
    advice = "it can be intact: resume again once it can be read, or name another with --resume"
    return CheckpointError(f"{error}; {advice}")


def generation_of(folder: Path, start: Position) -> int:
    """Return the generation of a run in this folder that starts at this position.

    It is a new one if the folder holds a later state: the run then goes back behind it. A file
    whose position cannot be read counts as later.
    """
    later = list[int]()
    for path in list_checkpoints(folder):
        try:
            position = peek_position(path)
        except CheckpointError:
            later.append(start.generation)
        else:
            later += [position.generation] if position > start else []
    return max(later) + 1 if later else start.generation


def make_newest(folder: Path, saved: Checkpoint) -> None:
    """Replace checkpoint.safetensors by this state, unless it is as far."""
    _advance(folder / NEWEST, saved)


def make_best(folder: Path, saved: Checkpoint) -> None:
    """Make the best checkpoint of this state if a kill has prevented its file or its replacement.

    It is this state, or one that was renamed by a run that went back and has saved nothing.
    """
    best, aside = folder / BEST, _aside(folder, saved.progress.best_step)
    if saved.progress.best_step == saved.state.step > 0:
        _advance(best, saved)
    elif _position_at(best) == NOWHERE and _holds_best_of(aside, saved):
        aside.rename(best)


def _holds_best_of(path: Path, saved: Checkpoint) -> bool:
    try:
        return load_checkpoint(path).progress.best_loss == saved.progress.best_loss
    except CheckpointError:
        return False


def _advance(path: Path, saved: Checkpoint) -> None:
    if _position_at(path) < position_of(saved):
        write_atomically(path, serialize(saved))


def _position_at(path: Path) -> Position:
    """Return the position of a file; NOWHERE if it is missing or damaged."""
    try:
        return peek_position(path)
    except UnreadableError:
        raise
    except CheckpointError:
        return NOWHERE


def restore_best(folder: Path, saved: Checkpoint) -> str:
    """Make the best checkpoint of a folder that of a run which continues from this state.

    One from further on is renamed: return a line about it, else "".
    """
    moved = _set_best_aside(folder, saved.state.step)
    make_best(folder, saved)
    return moved


def _aside(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_best-{step}.safetensors"


def _set_best_aside(folder: Path, step: int) -> str:
    best = folder / BEST
    best_step = _position_at(best).step
    if best_step <= step:
        return ""
    best.rename(aside := _aside(folder, best_step))
    return f"The best checkpoint was from step {best_step}, further on; it is kept as {aside}."


def no_checkpoint(folder: Path) -> str:
    """Return the message of a --resume that finds nothing."""
    return (
        f"there is no checkpoint in {folder}; leave --resume out to start a new run, "
        "or give --out the folder of the old one"
    )


# Locks


def lock_folder(folder: Path) -> FileIO:
    """Create the folder if needed, lock it and return its open lock file."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open_own(folder / LOCK)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        try:
            _take(lock, folder)
            if is_at(lock, folder / LOCK):
                if os.fstat(lock.fileno()).st_nlink == 1:
                    break
                (folder / LOCK).unlink()  # it is another file's content too: begin a new one
        except FolderError:
            lock.close()
            raise
        except OSError as error:
            lock.close()
            raise _cannot_write(folder, error) from error
        lock.close()  # its holder has just removed it
    with contextlib.suppress(OSError):  # on a full disk the lock still holds
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()}\n".encode())
    return lock


def _take(lock: FileIO, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FolderInUse(
            f"{folder} is in use by another run (process {_owner(lock)}); "
            "wait for it or give another --out"
        ) from error
    except OSError as error:
        raise FolderError(
            f"--out {folder} cannot be locked: {error.strerror}; give one on another disk"
        ) from error
    if not OWNER.fullmatch(content := lock.read(MAX_OWNER)):
        raise FolderError(
            f"{folder / LOCK} holds {content[:20]!r}, not the number of a process; "
            "move it away or give another --out"
        )


def _cannot_write(folder: Path, error: OSError) -> FolderError:
    reason = error.strerror
    if isinstance(error, FileExistsError):
        reason = "it is a file, not a folder"
    elif error.filename and Path(error.filename).name == LOCK:
        reason = f"{error.filename}: {reason}"
    return FolderError(f"--out {folder} cannot be written: {reason}; give a folder that can")


def _owner(lock: FileIO) -> str:
    lock.seek(0)
    number = OWNER.fullmatch(lock.read(MAX_OWNER))
    return number[1].decode() if number and number[1] else "unknown"


def is_at(file: FileIO, path: Path) -> bool:
    """Return whether an open file is the one at `path`; OSError if that is unknown."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def current_path(file: FileIO) -> Path | None:
    """Return where an open file is now, or None if it was removed or the system does not know.

    Raises OSError if the path cannot be reached.
    """
    try:
        if macos := getattr(fcntl, "F_GETPATH", None):
            raw = fcntl.fcntl(file, macos, bytes(1024)).rstrip(b"\0")
        else:
            raw = os.fsencode(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:
        return None
    path = Path(os.fsdecode(raw))
    return path if is_at(file, path) else None
