"""The thread that writes checkpoints, so that a step never waits for a disk.

It is handed NumPy copies and never touches a device; what became of each is asked for later.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_randygpt.checkpoint import BEST, Checkpoint, save_checkpoint
from mlx_randygpt.reports import SaveLog


@dataclass(frozen=True)
class Saved:
    """One file the writer has dealt with; `error` is empty where it is safe on the disk."""

    path: Path
    checkpoint: Checkpoint
    error: str = ""

    def log(self) -> SaveLog:
        """What the run tells of it."""
        best, loss = self.path.name == BEST, self.checkpoint.progress.best_loss
        step = self.checkpoint.state.step
        return SaveLog(step, str(self.path), best, loss if best else math.nan, self.error)


class CheckpointWriter:
    """Writes snapshots on its own thread. Of several for one path only the newest is written."""

    def __init__(self, save: Callable[[Path, Checkpoint], None] = save_checkpoint) -> None:
        self._save = save
        self._waiting: dict[Path, Checkpoint] = {}
        self._finished: list[Saved] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, path: Path, checkpoint: Checkpoint) -> None:
        """Have this snapshot written soon; returns at once."""
        with self._changed:
            self._waiting[path] = checkpoint
            self._changed.notify_all()

    def finished(self) -> list[Saved]:
        """What was written, or failed, since the last call."""
        with self._changed:
            done, self._finished = self._finished, []
        return done

    def close(self) -> list[Saved]:
        """Wait until nothing is left to write, end the thread, return what `finished` would."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        return self.finished()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            path, checkpoint = job
            try:
                self._save(path, checkpoint)
                saved = Saved(path, checkpoint)
            except Exception as error:  # the run goes on; the screen and the exit code tell
                saved = Saved(path, checkpoint, error=str(error))
            with self._changed:
                self._finished.append(saved)

    def _next(self) -> tuple[Path, Checkpoint] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            path = next(iter(self._waiting))
            return path, self._waiting.pop(path)
