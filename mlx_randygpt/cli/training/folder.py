"""The output folder of a run: one writer at a time, metrics, samples and config.toml."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from mlx_randygpt import files
from mlx_randygpt.checkpoint import (
    BEST,
    NEWEST,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    peek_step,
    to_strict_json,
)
from mlx_randygpt.config import UserError
from mlx_randygpt.training.reports import EvalLog, Report, SampleLog, StepLog

FLUSH_SECONDS = 1.0
LOCK = ".lock"
LOGS = ("metrics.jsonl", "samples.jsonl")


class FolderError(UserError, OSError):
    """An output folder that cannot be used."""


class FolderInUse(FolderError):
    """A folder that another run holds."""


class RunFolder:
    """Context manager that holds the folder's lock, which dies with its process. As a path it is
    where the folder is by then: one that was moved is followed, one that is gone made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""  # why the lines of metrics and samples wait
        self.news: list[str] = []  # what became of the folder, not yet told
        self._flushed_at = time.monotonic()
        self._config_toml: str | None = None  # None: no run has begun here
        self._logs: list[LogFile] = []  # metrics and samples

    def __enter__(self) -> RunFolder:
        parts = (self.path / LOCK, self.path, *self.path.parents)
        self._made = [part for part in parts if not part.exists()]
        self._lock = lock_folder(self.path)
        files.sweep(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._close_logs()
        with contextlib.suppress(OSError):
            self._lock.truncate(0)
            if self._config_toml is None:  # refused: as if it had never been asked for
                for made in self._made:
                    made.unlink() if made.name == LOCK else made.rmdir()
        self._lock.close()

    def __fspath__(self) -> str:
        old = self.path
        if not is_at(self._lock, old / LOCK):
            if now := whereabouts(self._lock):
                self.path = now.parent
                self.news.append(f"{old} was moved; this run goes on in {self.path}.")
            else:
                with contextlib.suppress(FolderError):  # who saves will say why, and try again
                    self._make_again()
        return str(self.path)

    def _make_again(self) -> None:
        """The folder was removed; it may be another run's by now, then take one beside it."""
        old = self.path
        try:
            lock = lock_folder(old)
        except FolderInUse:
            self.path = old.with_name(f"{old.name}-{os.getpid()}")
            lock = lock_folder(self.path)
        self._lock.close()
        self._lock = lock
        self.news.append(f"{old} was removed; this run goes on in {self.path}, made anew.")
        if self._config_toml is not None:
            self._close_logs()
            self.begin(self._config_toml, fresh=False)

    def _close_logs(self) -> None:
        for log in self._logs:
            log.close()

    def checkpoints(self) -> list[Path]:
        """The checkpoints here: checkpoint.safetensors, then the others, the latest first."""
        found = self.path.glob("checkpoint*.safetensors")
        return sorted(found, key=lambda path: (path.name != NEWEST, -path.stat().st_mtime))

    def refuse_if_used(
        self,
        advice: str = "--resume goes on with it, --overwrite starts anew, --out DIR goes elsewhere",
    ) -> None:
        """FolderError where a run would write over another's checkpoints."""
        if found := self.checkpoints():
            raise FolderError(f"{self.path} already holds a checkpoint ({found[0].name}); {advice}")

    def newest(self) -> tuple[Checkpoint, list[str]]:
        """What a bare --resume means: the valid checkpoint of the highest step, and a line for
        each file that was skipped because it is damaged."""
        if not (found := self.checkpoints()):
            raise CheckpointError(no_checkpoint(self.path))
        steps, skipped = dict[Path, int](), list[str]()
        for path in found:
            try:
                steps[path] = peek_step(path)
            except CheckpointError as error:
                skipped.append(f"Skipped: {error}")
        for path in sorted(steps, key=lambda path: self._rank(path, steps), reverse=True):
            try:
                return load_checkpoint(path), skipped
            except CheckpointError as error:
                skipped.append(f"Skipped: {error}")
        every = "; ".join(line.removeprefix("Skipped: ") for line in skipped)
        raise CheckpointError(f"no checkpoint in {self.path} can be read: {every}")

    def _rank(self, path: Path, steps: dict[Path, int]) -> tuple[bool, bool, int]:
        """checkpoint.safetensors first, unless another is both further and written after it, as
        a kill between two saves leaves them; else the furthest."""
        newest = self.path / NEWEST
        if newest not in steps:
            return False, False, steps[path]
        later = path.stat().st_mtime_ns > newest.stat().st_mtime_ns
        return later and steps[path] > steps[newest], path == newest, steps[path]

    def keep_best(self, step: int) -> str:
        """A run goes on from `step`: where the best checkpoint is from further on, keep it under
        another name; one line that says so, or ""."""
        best = self.path / BEST
        if not best.exists() or (at := peek_step(best)) <= step:
            return ""
        kept = best.with_name(f"checkpoint_best-{at}.safetensors")
        best.rename(kept)
        return f"The best checkpoint was from step {at}, further on; it is kept as {kept}."

    def begin(self, config_toml: str, *, fresh: bool) -> None:
        """Write config.toml, open metrics.jsonl and samples.jsonl; a fresh run empties these and
        takes away another run's checkpoints, but for the newest, which its own first replaces."""
        self._config_toml = config_toml
        try:
            for old in self.checkpoints() if fresh else ():
                if old.name != NEWEST:
                    old.unlink()
            files.write(self.path / "config.toml", config_toml.encode("utf-8", "replace"))
            self._logs = [LogFile(self.path / name, fresh) for name in LOGS]
        except OSError as error:
            raise FolderError(f"{error.filename} cannot be written: {error.strerror}") from error

    def record(self, report: Report, log_every: int) -> None:
        """One line of metrics.jsonl or samples.jsonl, written within a second or so."""
        metrics, samples = self._logs
        if values := metrics_row(report, log_every):
            metrics.add(values)
        if isinstance(report, SampleLog):
            samples.add(asdict(report))
        is_old = time.monotonic() - self._flushed_at > FLUSH_SECONDS
        if is_old or isinstance(report, EvalLog | SampleLog):
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait. That a disk refuses them is told of once, and its end too."""
        self._flushed_at, before, self.problem = time.monotonic(), self.problem, ""
        for log in self._logs:
            try:
                log.flush()
            except OSError as error:
                self.problem = error.strerror or str(error)
        names = " and ".join(LOGS)
        if self.problem and not before:
            self.news.append(f"{names} wait in memory: {self.problem}.")
        elif before and not self.problem:
            self.news.append(f"{names} are written again, with every line.")

    def unwritten(self) -> str:
        """What metrics.jsonl and samples.jsonl lack at the end, for people; "" is nothing."""
        lines = sum(map(len, self._logs))
        return f"{lines} lines of {' and '.join(LOGS)} are lost: {self.problem}" if lines else ""


def lock_folder(folder: Path) -> TextIO:
    """The folder's lock file, held by this process; the folder is made where there is none."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            is_file = folder.is_file()
            reason = "it is a file, not a folder" if is_file else error.strerror
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
        lock.close()  # whoever held it has just taken it away
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
    return lock


def _owner(lock: TextIO) -> str:
    with lock:
        lock.seek(0)
        return lock.read().strip() or "unknown"


def is_at(file: TextIO, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def whereabouts(file: TextIO) -> Path | None:
    """Where an open file is by now; None where it is gone or the system does not tell."""
    try:
        if macos := getattr(fcntl, "F_GETPATH", None):
            told = fcntl.fcntl(file, macos, bytes(1024)).rstrip(b"\0")
        else:
            told = os.fsencode(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:
        return None
    path = Path(os.fsdecode(told))
    return path if is_at(file, path) else None


def no_checkpoint(folder: Path) -> str:
    """The line for a --resume that finds nothing."""
    return (
        f"there is no checkpoint in {folder}; leave --resume out to start a new run, "
        "or give --out the folder of the old one"
    )


def metrics_row(report: Report, log_every: int) -> dict[str, Any]:
    """The row of metrics.jsonl that a report makes; {} where it makes none."""
    if isinstance(report, StepLog) and report.step % log_every == 0:
        names = "step loss bits_per_byte lr grad_norm tokens tokens_per_second seconds"
    elif isinstance(report, EvalLog):
        names = "step val_loss perplexity bits_per_byte seconds"
    else:
        return {}
    return {name: to_strict_json(getattr(report, name)) for name in names.split()}


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
