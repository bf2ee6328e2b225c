"""The output folder of a run: its lock, its place if it is moved, its logs and checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from mlx_randygpt import files
from mlx_randygpt.analysis.metrics import metrics_row
from mlx_randygpt.checkpoint import (
    BEST,
    NEWEST,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    peek_step,
)
from mlx_randygpt.config import UserError
from mlx_randygpt.training.reports import EvalLog, Report, SampleLog

FLUSH_SECONDS = 1.0
MAX_LINE = 1 << 20  # bytes; a line of metrics has about 200, a sample rarely 4,000
LOCK = ".lock"
LOGS = ("metrics.jsonl", "samples.jsonl")
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
        self._created = [part for part in parts if not part.exists()]
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
        """Return where the folder is now: follow it if it was moved, restore it if removed."""
        old = self.path
        if not is_at(self._lock, old / LOCK):
            if lock_path := current_path(self._lock):
                self.path = lock_path.parent
                self.news.append(f"{old} was moved; this run continues in {self.path}.")
            else:
                with contextlib.suppress(FolderError):  # saving reports the reason and tries again
                    self._recreate()
        return self.path

    def _recreate(self) -> None:
        """Create the folder again, or one beside it if another run has the name by now."""
        old = self.path
        try:
            lock = lock_folder(old)
        except FolderInUse:
            self.path = old.with_name(f"{old.name}-{os.getpid()}")
            lock = lock_folder(self.path)
        self._lock.close()
        self._lock = lock
        self.news.append(f"{old} was removed; this run continues in {self.path}, created again.")
        if self._config_toml is not None:
            self.logs.close()
            self.begin(self._config_toml, fresh=False)

    def begin(self, config_toml: str, *, fresh: bool) -> None:
        """Write config.toml and open the logs.

        A fresh run empties the logs and removes another run's checkpoints, except the newest,
        which its own first one replaces.
        """
        self._config_toml = config_toml
        try:
            for old in list_checkpoints(self.path) if fresh else ():
                if old.name != NEWEST:
                    old.unlink()
            (self.path / "config.toml").write_text(config_toml, encoding="utf-8", errors="replace")
            self.logs.open(self.path, fresh=fresh)
        except OSError as error:
            raise FolderError(f"{error.filename} cannot be written: {error.strerror}") from error


class RunLogs:
    """metrics.jsonl and samples.jsonl of a run; lines wait in memory while the disk is full."""

    def __init__(self, note: Callable[[str], object]) -> None:
        self._note = note
        self._problem = ""  # why lines wait
        self._flushed_at = time.monotonic()
        self._files: list[LogFile] = []  # one for each of LOGS

    def open(self, folder: Path, *, fresh: bool) -> None:
        """Open both files; a fresh run empties them."""
        self._files = [LogFile(folder / name, fresh) for name in LOGS]

    def record(self, report: Report, log_every: int) -> None:
        """Append the line of a report, if it has one; it is written within about a second."""
        metrics, samples = self._files
        if row := metrics_row(report, log_every):
            metrics.add(row)
        if isinstance(report, SampleLog):
            samples.add(asdict(report))
        is_old = time.monotonic() - self._flushed_at > FLUSH_SECONDS
        if is_old or isinstance(report, EvalLog | SampleLog):
            self.flush()

    def flush(self) -> None:
        """Write the waiting lines; report once that a disk refuses them, and once when it stops."""
        self._flushed_at = time.monotonic()
        before, self._problem = self._problem, ""
        for file in self._files:
            try:
                file.flush()
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
        for file in self._files:
            file.close()


class LogFile:
    """A file of JSON lines to append to; opening it raises OSError.

    A fresh run empties it; a resumed one removes an incomplete last line.
    """

    def __init__(self, path: Path, fresh: bool) -> None:
        if not fresh and path.exists():
            _drop_torn_line(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if fresh:
            self._file.truncate(0)
        self._waiting: list[str] = []

    def __len__(self) -> int:
        """Return the number of waiting lines."""
        return len(self._waiting)

    def add(self, values: object) -> None:
        """Add a line for the next `flush`."""
        self._waiting.append(json.dumps(values) + "\n")

    def flush(self) -> None:
        """Write the waiting lines; on OSError all of them stay waiting and none is in the file."""
        content = memoryview("".join(self._waiting).encode())
        size = os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Write what waits, if possible, and close the file."""
        with contextlib.suppress(OSError):
            self.flush()
        self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line left by a crash."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_LINE))
        tail = file.read()
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


# Checkpoints in a folder


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder: checkpoint.safetensors first, then the latest."""
    paths = folder.glob("checkpoint*.safetensors")
    return sorted(paths, key=lambda path: (path.name != NEWEST, -path.stat().st_mtime))


def refuse_checkpoints(
    folder: Path,
    advice: str = "--resume continues that run, --overwrite replaces it, --out DIR uses another "
    "folder",
) -> None:
    """Raise FolderError if a run would overwrite another one's checkpoints."""
    if paths := list_checkpoints(folder):
        raise FolderError(f"{folder} already holds a checkpoint ({paths[0].name}); {advice}")


def newest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Return the valid checkpoint of the highest step, and a line for each damaged file.

    This is the checkpoint of a bare --resume. Raises CheckpointError if there is none.
    """
    paths = list_checkpoints(folder)
    if not paths:
        raise CheckpointError(no_checkpoint(folder))
    steps, skipped = dict[Path, int](), list[str]()
    for path in paths:
        try:
            steps[path] = peek_step(path)
        except CheckpointError as error:
            skipped.append(f"Skipped: {error}")
    for path in sorted(steps, key=lambda path: _rank(path, steps), reverse=True):
        try:
            return load_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(f"Skipped: {error}")
    reasons = "; ".join(line.removeprefix("Skipped: ") for line in skipped)
    raise CheckpointError(f"no checkpoint in {folder} can be read: {reasons}")


def _rank(path: Path, steps: dict[Path, int]) -> tuple[bool, bool, int]:
    """Return a sort key: checkpoint.safetensors is highest unless another is further and newer.

    A kill between two saves can leave such a file. Without checkpoint.safetensors the furthest
    is highest.
    """
    newest = path.with_name(NEWEST)
    if newest not in steps:
        return False, False, steps[path]
    is_newer = path.stat().st_mtime_ns > newest.stat().st_mtime_ns
    return is_newer and steps[path] > steps[newest], path == newest, steps[path]


def set_best_aside(folder: Path, step: int) -> str:
    """Rename the best checkpoint if it is from beyond `step`; return a line about it, or ""."""
    best = folder / BEST
    if not best.exists() or (best_step := peek_step(best)) <= step:
        return ""
    aside = best.with_name(f"checkpoint_best-{best_step}.safetensors")
    best.rename(aside)
    return f"The best checkpoint was from step {best_step}, further on; it is kept as {aside}."


def no_checkpoint(folder: Path) -> str:
    """Return the message of a --resume that finds nothing."""
    return (
        f"there is no checkpoint in {folder}; leave --resume out to start a new run, "
        "or give --out the folder of the old one"
    )


# Locks


def lock_folder(folder: Path) -> TextIO:
    """Create the folder if needed, lock it and return its open lock file."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            reason = "it is a file, not a folder" if folder.is_file() else error.strerror
            raise FolderError(
                f"--out {folder} cannot be written: {reason}; give a folder that can"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(
                f"{folder} is in use by another run (process {_owner(lock)}); "
                "wait for it or give another --out"
            ) from error
        except OSError as error:
            lock.close()
            raise FolderError(
                f"--out {folder} cannot be locked: {error.strerror}; give one on another disk"
            ) from error
        if is_at(lock, folder / LOCK):
            break
        lock.close()  # its holder has just removed it
    with contextlib.suppress(OSError):  # on a full disk the lock still holds
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
    return lock


def _owner(lock: TextIO) -> str:
    with lock:
        lock.seek(0)
        return lock.read().strip() or "unknown"


def is_at(file: TextIO, path: Path) -> bool:
    """Return whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def current_path(file: TextIO) -> Path | None:
    """Return where an open file is now, or None if it was removed or the system does not know."""
    try:
        if macos := getattr(fcntl, "F_GETPATH", None):
            raw = fcntl.fcntl(file, macos, bytes(1024)).rstrip(b"\0")
        else:
            raw = os.fsencode(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:
        return None
    path = Path(os.fsdecode(raw))
    return path if is_at(file, path) else None
