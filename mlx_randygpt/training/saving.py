"""When checkpoints are written, and the thread that writes them so that no step waits for a disk.

It is handed NumPy copies and never touches a device; what became of each is asked for later.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from os import PathLike
from pathlib import Path

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
Folder = PathLike[str]  # asked for each file: a folder may be moved meanwhile


def save_log(path: Path, checkpoint: Checkpoint, error: str = "") -> SaveLog:
    """What the run tells of a file; `error` is empty where it is safe on the disk."""
    best, loss = path.name == BEST, checkpoint.progress.best_loss
    return SaveLog(checkpoint.state.step, str(path), best, loss if best else math.nan, error)


class CheckpointWriter:
    """Writes snapshots on its own thread. Of several for one path only the newest is written.

    What fails stays in memory and is tried again every `retry_seconds` and when the writer is
    closed; the first failure of a path is told, and the last.
    """

    def __init__(
        self,
        save: Callable[[Path, Checkpoint], None] = save_checkpoint,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._save, self._retry_seconds = save, retry_seconds
        self._waiting: dict[Path, Checkpoint] = {}
        self._failed: dict[Path, Checkpoint] = {}
        self._told: set[Path] = set()  # whose failure is known
        self._last_try = self._closing = False
        self._finished: list[SaveLog] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, path: Path, checkpoint: Checkpoint) -> None:
        """Have this snapshot written soon; returns at once."""
        with self._changed:
            self._waiting.pop(path, None)  # behind what is older than this snapshot
            self._waiting[path] = checkpoint
            self._changed.notify()

    def finished(self) -> list[SaveLog]:
        """What was written, or failed, since the last call."""
        with self._changed:
            done, self._finished = self._finished, []
        return done

    def close(self) -> list[SaveLog]:
        """Wait until nothing is left to write, end the thread, return what `finished` would."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        return self.finished()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._write(*job)
            del job  # a copy of all weights and moments, which is not kept until the next

    def _write(self, path: Path, checkpoint: Checkpoint) -> None:
        error = ""
        try:
            self._save(path, checkpoint)
        except Exception as failure:  # the run goes on; the screen and the exit code tell
            error = str(failure)
        with self._changed:
            self._note(path, checkpoint, error)

    def _note(self, path: Path, checkpoint: Checkpoint, error: str) -> None:
        known = path in self._told and not self._last_try
        if error:
            self._failed[path] = checkpoint
            self._told.add(path)
        else:
            self._failed.pop(path, None)
            self._told.discard(path)
        if not (error and known):
            self._finished.append(save_log(path, checkpoint, error))

    def _next(self) -> tuple[Path, Checkpoint] | None:
        """The next snapshot to write; None when the writer is closed and all was tried."""
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
    """When the state of a run goes to the disk, and under which name."""

    def __init__(self, config: TrainConfig, out: Folder | None, clock: Callable[[], float]) -> None:
        self._config, self._out, self._clock = config, out, clock
        self._writer = CheckpointWriter() if out is not None else None
        self._saved_at = clock()

    def due(self, step: int) -> bool:
        """Whether `save_due` would save."""
        return self._keep_due(step) or self._save_due(step)

    def save_due(self, step: int, snapshot: Callable[[], Checkpoint]) -> None:
        """Have written what is due at this step: a milestone, the newest, or nothing."""
        if self._keep_due(step):
            self.save(kept_name(step), snapshot)
        if self._save_due(step):
            self.save(NEWEST, snapshot)
            self._saved_at = self._clock()

    def save(self, name: str, snapshot: Callable[[], Checkpoint]) -> None:
        """Have a snapshot written soon."""
        if self._writer is not None and self._out is not None:
            self._writer.submit(Path(self._out) / name, snapshot())

    def finished(self) -> list[SaveLog]:
        """What was written, or failed, since the last call."""
        return self._writer.finished() if self._writer else []

    def finish(self, snapshot: Callable[[], Checkpoint]) -> list[SaveLog]:
        """Write the last state, wait for all, and tell of both files: the best one too, which
        may have been safe for long and is read again."""
        self.save(NEWEST, snapshot)
        logs = sorted(self.close(), key=lambda log: log.best)
        if self._out is None or any(log.best for log in logs):
            return logs
        if (best := Path(self._out) / BEST).exists():
            try:
                logs.append(save_log(best, load_checkpoint(best, weights_only=True)))
            except CheckpointError as error:
                logs.append(SaveLog(0, str(best), True, math.nan, str(error)))
        return logs

    def close(self) -> list[SaveLog]:
        """Wait until nothing is left to write; what `finished` would return."""
        return self._writer.close() if self._writer else []

    def _keep_due(self, step: int) -> bool:
        config = self._config
        start = decay_start(config.iters, config.warmup)
        return (config.schedule == "trapezoid" and step == start) or is_due(step, config.keep_every)

    def _save_due(self, step: int) -> bool:
        steps, seconds = parse_interval(self._config.save_every)
        return is_due(step, steps) or 0 < seconds <= self._clock() - self._saved_at
