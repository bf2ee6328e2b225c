"""One run on several ranks: how they join, what they agree on, and how a lost rank is noticed.

Only rank 0 writes and draws; the others compute and stay silent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from mlx_randygpt.backends import install_mlx, make_backend, require_features
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.backends.ranks.group import Group, RankError, SingleRank, is_ranked, ring_hosts
from mlx_randygpt.backends.ranks.heartbeat import Heartbeat, own_addresses
from mlx_randygpt.cli.output import echo
from mlx_randygpt.cli.training.agreement import digest_arrays, digest_json
from mlx_randygpt.config import ModelConfig, TrainConfig, UserError
from mlx_randygpt.state import TrainState

LIFELINE = "MLXGPT_LIFELINE"  # number of an open file that ends when the launcher does
RANK_TIMEOUT = 20.0  # seconds of silence after which a rank is lost
WAITING_NOTE_SECONDS = 10
JOIN_SECONDS = 600
LEAVE_SECONDS = 5  # for a process to end by itself after another rank was lost


class Team:
    """Context manager that makes this process one of the ranks of a run, or the only one."""

    def __init__(self, timeout: float) -> None:
        self.group: Group = SingleRank()
        self.n_beside = 1  # ranks on the cores of this one, itself included
        self._timeout = timeout
        self._watch = Watch(timeout)

    @property
    def rank(self) -> int:
        """The number of this rank; rank 0 leads."""
        return self.group.rank

    @property
    def suffix(self) -> str:
        """Return the end of the line about the backend: `, 4 ranks`, or ""."""
        return f", {self.group.size} ranks" if self.group.size > 1 else ""

    @property
    def exit_code(self) -> int:
        """The exit code that a signal to this rank, or to any, asks for; 0 if there was none."""
        if self.group.size == 1:
            return self.group.requested_exit_code()
        return self.group.agreed_exit_code

    def __enter__(self) -> Team:
        if LIFELINE in os.environ:
            descriptor = int(os.environ[LIFELINE])
            threading.Thread(target=_hold, args=(descriptor,), daemon=True).start()
        if not 1 <= self._timeout <= 3600:
            raise RankError(f"--rank-timeout {self._timeout:g} is not between 1 and 3600 s")
        if is_ranked():
            self.group = _join()
        if self.group.size > 1:
            self._watch.connect(self.group)
            cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
            places = self.group.gather(digest_json([socket.gethostname(), uuid.getnode(), cores]))
            self.n_beside = int((places == places[self.rank]).all(axis=1).sum())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, UserError):
            self._watch.explain(error)
        self.finish(1 if error is not None else 0)

    def start_watch(
        self,
        stop_requested: Callable[[], int],
        release_terminal: Callable[[], None] = lambda: None,
        last_words: Callable[[], str] = lambda: "",
    ) -> None:
        """Prepare for the training loop.

        `stop_requested` returns the exit code this rank wants to stop with, or 0. If a rank is
        lost, the terminal is released and `last_words` end the error message.
        """
        self.group.requested_exit_code = stop_requested
        self._watch.release_terminal, self._watch.last_words = release_terminal, last_words

    def finish(self, code: int = 0) -> None:
        """Announce that training is over: no more collectives, other ranks may exit."""
        self._watch.finish(code)

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Do in this block what rank 0 does before its start message.

        If it fails, the other ranks are sent exit code 1, and only rank 0 prints the error.
        """
        try:
            yield
        except Exception:
            self.group.broadcast(1)
            raise

    def check(self, backend_name: str, train: TrainConfig) -> None:
        """Raise RankError if several ranks cannot train with this backend and batch size."""
        if self.group.size == 1:
            return
        require_features(backend_name, ranks=True)
        if train.batch_size < self.group.size:
            raise RankError(
                f"--batch-size {train.batch_size} is too small for {self.group.size} ranks; "
                f"each needs a sequence, so give at least {self.group.size}, or fewer ranks"
            )

    def agree(self, values: dict[str, Any]) -> None:
        """Raise RankError if a rank has another value than rank 0 for one of these (collective)."""
        digests = self.group.gather(np.concatenate([digest_json(v) for v in values.values()]))
        same = (digests == digests[0]).reshape(self.group.size, len(values), -1).all(axis=2)
        for name, ranks in zip(values, same.T, strict=True):
            if not ranks.all():
                other = ", ".join(map(str, np.flatnonzero(~ranks)))
                raise RankError(
                    f"rank {other} has another {name} than rank 0; "
                    "give every rank the same options, text and version"
                )

    def make_backend(
        self, name: str, model: ModelConfig, train: TrainConfig, state: TrainState
    ) -> Backend:
        """Return the backend; several ranks all begin with rank 0's state (collective)."""
        if self.group.size == 1:
            return make_backend(name, model, train, state)
        train = replace(train, threads=max(1, train.threads // self.n_beside))
        backend = make_backend(name, model, train, state, group=self.group)
        received = backend.state()
        digest = digest_arrays([received.params, received.moments])
        self.agree({"state after it was sent": [digest, received.step]})
        return backend


class Watch:
    """The heartbeat between the ranks, and what happens when one is lost."""

    def __init__(self, timeout: float) -> None:
        self.release_terminal: Callable[[], None] = lambda: None
        self.last_words: Callable[[], str] = lambda: ""
        self._timeout = timeout
        self._heartbeat: Heartbeat | None = None
        self._over = False

    def connect(self, group: Group) -> None:
        """Connect every rank with rank 0, beside the connections of the group (collective)."""
        heartbeat = Heartbeat(group.rank, group.size, self._timeout, self._end)
        if group.rank == 0:
            ring = ring_hosts() or [[]]
            group.broadcast([own_addresses(ring[0]), *heartbeat.listen()])
            connected = True
        else:
            addresses, port, token = group.broadcast(None)
            connected = heartbeat.connect(addresses, port, token)
        connections = group.gather(np.array([int(connected)], np.int32))[:, 0]
        self._heartbeat = heartbeat
        if group.rank == 0 and not connections.all():
            ranks = ", ".join(map(str, np.flatnonzero(connections == 0)))
            echo(
                f"Rank {ranks} has no heartbeat connection to rank 0 (firewall?). If it hangs, "
                "the run will not notice.",
                err=True,
            )

    def finish(self, code: int) -> None:
        """Tell the other ranks that this one ends with `code`, and stop watching."""
        self._over = True
        if self._heartbeat is not None:
            self._heartbeat.leave(code)
            self._heartbeat = None

    def explain(self, error: RuntimeError) -> None:
        """Raise RankError in place of MLX's own error if a rank was lost."""
        reason = self._heartbeat.why(self._timeout) if self._heartbeat else ""
        if reason and not self._over:
            message = self._message(reason)
            self.finish(1)
            raise RankError(message) from error

    def _end(self, reason: str) -> None:
        """End this process if it does not end by itself; called by the heartbeat's thread.

        It does not while MLX waits for a rank that hangs.
        """
        time.sleep(LEAVE_SECONDS)
        if not self._over:
            self._over = True
            self.release_terminal()
            echo(f"Error: {self._message(reason)}", err=True)
            os._exit(1)

    def _message(self, reason: str) -> str:
        return ". ".join(filter(None, (reason, self.last_words())))


def _join() -> Group:
    try:
        from mlx_randygpt.backends.ranks.ring import join
    except ImportError as error:
        raise RankError(
            "several ranks need MLX, for its collectives, with the NumPy backend too: "
            f"{install_mlx()} ({error})"
        ) from error
    noted = False

    def wait(seconds: float) -> None:
        nonlocal noted
        if seconds > WAITING_NOTE_SECONDS and not noted:
            noted = True
            rank = os.environ.get("MLX_RANK", "?")
            echo(f"Rank {rank}: waiting for the other ranks.", err=True)
        if seconds > JOIN_SECONDS:
            raise RankError(f"the other ranks did not join within {JOIN_SECONDS} s; start all")

    group = join(wait)
    return group if group.size > 1 else SingleRank()


def _hold(lifeline: int) -> None:
    """Stop the run when the launcher is gone, however it ended.

    A byte from the launcher is the number of a signal, for a rank on another machine.
    """
    while content := os.read(lifeline, 1):
        os.kill(os.getpid(), content[0])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(JOIN_SECONDS)
    os._exit(143)
