"""When checkpoints are written, and the thread that writes them so that no step waits for a disk.

The thread gets NumPy copies and never touches a device; results are collected with `finished()`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

from mlx_randygpt import files
from mlx_randygpt.checkpoint import (
    BEST,
    NEWEST,
    Checkpoint,
    CheckpointError,
    kept_name,
    load_checkpoint,
    save_checkpoint,
)
from mlx_randygpt.config import TrainConfig, parse_interval
from mlx_randygpt.training.reports import SaveLog
from mlx_randygpt.training.schedule import decay_start, is_due

RETRY_SECONDS = 10.0
# A callable is called for every file, since the folder can move during a run.
Folder = str | Path | Callable[[], Path]


def save_log(path: Path, checkpoint: Checkpoint, error: str = "") -> SaveLog:
    """Return the report of a file; `error` is empty if the file is safe on the disk."""
    best, loss = path.name == BEST, checkpoint.progress.best_loss
    return SaveLog(
        step=checkpoint.state.step,
        path=str(path),
        best=best,
        loss=loss if best else math.nan,
        error=error,
    )


class CheckpointWriter:
    """A thread that writes snapshots; of several for one path it writes only the newest.

    A snapshot that could not be written stays in memory and is tried again every `retry_seconds`
    and in `close`. The first failure of a path is reported, and the last. Before each write, `sync`
    puts the logs on the disk; if it raises OSError, only the last try writes without them.
    """

    def __init__(
        self,
        save: Callable[[Path, Checkpoint], None] = save_checkpoint,
        retry_seconds: float = RETRY_SECONDS,
        sync: Callable[[], object] = lambda: None,
    ) -> None:
        self._save, self._retry_seconds, self._sync = save, retry_seconds, sync
        self._waiting: dict[Path, Checkpoint] = {}
        self._failed: dict[Path, Checkpoint] = {}
        self._reported: set[Path] = set()  # whose failure was reported
        self._last_try = self._closing = False
        self._finished: list[SaveLog] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, path: Path, checkpoint: Checkpoint) -> None:
        """Queue a snapshot for writing; does not block."""
        with self._changed:
            self._waiting.pop(path, None)  # its turn comes after older snapshots
            self._waiting[path] = checkpoint
            self._changed.notify()

    def finished(self) -> list[SaveLog]:
        """Return reports of the writes that succeeded or failed since the last call."""
        with self._changed:
            done, self._finished = self._finished, []
        return done

    def close(self) -> list[SaveLog]:
        """Write everything that is queued, end the thread and return the last reports."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        return self.finished()

    def _work(self) -> None:
        while (item := self._next()) is not None:
            self._write(*item)
            del item  # free the copy of all weights and moments

    def _write(self, path: Path, checkpoint: Checkpoint) -> None:
        error = ""
        try:
            self._sync_logs(path)
            self._save(path, checkpoint)
        except Exception as failure:  # the run continues; screen and exit code report it
            error = str(failure)
        with self._changed:
            self._report(path, checkpoint, error)

    def _sync_logs(self, path: Path) -> None:
        try:
            self._sync()
        except OSError as error:
            if not self._last_try:
                reason = f"its log lines cannot be written: {error.strerror or error}"
                raise CheckpointError(f"could not write {path}: {reason}") from error

    def _report(self, path: Path, checkpoint: Checkpoint, error: str) -> None:
        is_repeated = path in self._reported and not self._last_try
        if error:
            self._failed[path] = checkpoint
            self._reported.add(path)
        else:
            self._failed.pop(path, None)
            self._reported.discard(path)
        if not (error and is_repeated):
            self._finished.append(save_log(path, checkpoint, error))

    def _next(self) -> tuple[Path, Checkpoint] | None:
        """Return the next snapshot to write, or None if closed and all were tried."""
        with self._changed:
            while not self._waiting:
                if self._closing and (self._last_try or not self._failed):
                    return None
                pause = self._retry_seconds if self._failed else None
                if self._closing or not self._changed.wait(pause):
                    self._last_try = self._closing
                    self._waiting, self._failed = self._failed, {}
            path = next(iter(self._waiting))
            return path, self._waiting.pop(path)


class Saver:
    """Decides when the state of a run is saved, and under which name."""

    def __init__(
        self,
        config: TrainConfig,
        out: Folder | None,  # None: save nothing
        clock: Callable[[], float],
        sync_logs: Callable[[], object] = lambda: None,
    ) -> None:
        self._config, self._out, self._clock = config, out, clock
        self._writer = CheckpointWriter(sync=sync_logs) if out is not None else None
        self._saved_at = clock()
        self._kept = -1  # step of the last kept checkpoint

    def due(self, step: int) -> bool:
        """Return whether `save_due` would save."""
        return self._keep_due(step) or self._save_due(step)

    def save_due(self, step: int, snapshot: Callable[[], Checkpoint]) -> None:
        """Queue what is due at this step: a kept checkpoint, the newest, both or nothing."""
        self._keep(step, snapshot)
        if self._save_due(step):
            self.save(NEWEST, snapshot)
            self._saved_at = self._clock()

    def save_best(self, step: int, snapshot: Callable[[], Checkpoint]) -> None:
        """Queue the best checkpoint, after a kept one that is due at this step.

        A run that is killed between the two resumes from the best one, beyond that step.
        """
        self._keep(step, snapshot)
        self.save(BEST, snapshot)

    def save(self, name: str, snapshot: Callable[[], Checkpoint]) -> None:
        """Queue a snapshot under this name; does not block."""
        if self._writer is not None:
            self._writer.submit(self._locate() / name, snapshot())

    def finished(self) -> list[SaveLog]:
        """Return reports of the writes that succeeded or failed since the last call."""
        return self._writer.finished() if self._writer else []

    def finish(self, snapshot: Callable[[], Checkpoint]) -> list[SaveLog]:
        """Write the last state, wait for all writes and return reports of the newest and best file.

        The best one may have been written long ago; it is read again.
        """
        self.save(NEWEST, snapshot)
        logs = sorted(self.close(), key=lambda log: log.best)
        if self._out is None or any(log.best for log in logs):
            return logs
        best = self._locate() / BEST
        try:
            if files.exists(best):
                logs.append(save_log(best, load_checkpoint(best, weights_only=True)))
        except (CheckpointError, OSError) as error:
            logs.append(SaveLog(step=0, path=str(best), best=True, loss=math.nan, error=str(error)))
        return logs

    def close(self) -> list[SaveLog]:
        """Write everything that is queued and return the last reports."""
        return self._writer.close() if self._writer else []

    def _locate(self) -> Path:
        assert self._out is not None, "only a run with a folder saves"
        return Path(self._out() if callable(self._out) else self._out)

    def _keep(self, step: int, snapshot: Callable[[], Checkpoint]) -> None:
        if self._keep_due(step) and step != self._kept:
            self.save(kept_name(step), snapshot)
            self._kept = step

    def _keep_due(self, step: int) -> bool:
        config = self._config
        start = decay_start(config.iters, config.warmup)
        return (config.schedule == "trapezoid" and step == start) or is_due(step, config.keep_every)

    def _save_due(self, step: int) -> bool:
        steps, seconds = parse_interval(self._config.save_every)
        return is_due(step, steps) or 0 < seconds <= self._clock() - self._saved_at
