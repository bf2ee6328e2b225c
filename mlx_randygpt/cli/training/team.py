"""One run on several ranks: how they come together, what rank 0 decides for all, and what is said
where one is lost. Only rank 0 writes and draws; the others compute and stay silent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from mlx_randygpt import __version__
from mlx_randygpt.backends import make_backend, require_features
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.backends.ranks.group import Group, RankError, SingleRank, is_ranked, ring_hosts
from mlx_randygpt.backends.ranks.heartbeat import Heartbeat, own_addresses
from mlx_randygpt.checkpoint import (
    Checkpoint,
    dataclass_from_json,
    header_facts,
    header_of,
    progress_from_json,
    to_strict_json,
)
from mlx_randygpt.config import ModelConfig, TrainConfig, UserError
from mlx_randygpt.model import initial_params
from mlx_randygpt.state import TrainState
from mlx_randygpt.training.loop import Run, TrainingDiverged, train
from mlx_randygpt.training.reports import EndLog

LIFELINE = "MLXGPT_LIFELINE"  # number of the open file that ends when the launcher does
RANK_TIMEOUT = 20.0  # seconds of silence
WAITING_NOTE_SECONDS = 10
JOIN_SECONDS = 600
LEAVE_SECONDS = 5  # for a rank that another has left, to end by itself


class Team:
    """Context manager of this process as one of the ranks of a run, or as the only one."""

    def __init__(self, timeout: float) -> None:
        self.group: Group = SingleRank()
        self._last_words: Callable[[], str] = lambda: ""
        self._restore: Callable[[], None] = lambda: None
        self._timeout = timeout
        self._heartbeat: Heartbeat | None = None
        self._over = False
        self.n_beside = 1  # ranks on the cores of this one, itself included

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def described(self) -> str:
        """For the line about the backend."""
        return f", {self.group.size} ranks" if self.group.size > 1 else ""

    @property
    def exit_code(self) -> int:
        """What the signals of this rank, or of any, have asked for."""
        return (
            self.group.requested_exit_code()
            if self.group.size == 1
            else self.group.agreed_exit_code
        )

    def __enter__(self) -> Team:
        if LIFELINE in os.environ:
            number = int(os.environ[LIFELINE])
            threading.Thread(target=_hold, args=(number,), daemon=True).start()
        if is_ranked():
            if not 1 <= self._timeout <= 3600:
                raise RankError(f"--rank-timeout {self._timeout:g} is not between 1 and 3600 s")
            self.group = _joined()
        if self.group.size > 1:
            self._begin_heartbeat()
            on = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
            places = self.group.gather(digest([socket.gethostname(), uuid.getnode(), on]))
            self.n_beside = int((places == places[self.rank]).all(axis=1).sum())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, UserError):
            self._explain(error)
        self.part(1 if error is not None else 0)

    def part(self, code: int = 0) -> None:
        """Nothing is summed from now on: the others may end."""
        self._over = True
        if self._heartbeat is not None:
            self._heartbeat.leave(code)
            self._heartbeat = None

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """What rank 0 does before it tells the others how to begin; where it fails, it tells them
        that: they end with code 1 and need not say why."""
        try:
            yield
        except Exception:
            self.group.broadcast(1)
            raise

    def check(self, backend_name: str, config: TrainConfig) -> None:
        """RankError where several ranks cannot train like this."""
        if self.group.size == 1:
            return
        require_features(backend_name, ranks=True)
        if config.batch_size < self.group.size:
            raise RankError(
                f"--batch-size {config.batch_size} is too small for {self.group.size} ranks; "
                f"each needs a sequence, so give at least {self.group.size}, or fewer ranks"
            )

    def begin(
        self, asked: Callable[[], int], restore: Callable[[], None], last_words: Callable[[], str]
    ) -> None:
        """The loop is about to begin: who asks it to stop, who gives the terminal back, and what
        is said where a rank is lost."""
        self.group.requested_exit_code, self._restore, self._last_words = asked, restore, last_words

    def agree(self, facts: dict[str, Any]) -> None:
        """RankError where a rank has another value than rank 0 for one of these; a collective."""
        digests = self.group.gather(np.concatenate([digest(fact) for fact in facts.values()]))
        same = (digests == digests[0]).reshape(self.group.size, len(facts), -1).all(axis=2)
        for name, ranks in zip(facts, same.T, strict=True):
            if not ranks.all():
                other = ", ".join(map(str, np.flatnonzero(~ranks)))
                raise RankError(
                    f"rank {other} has another {name} than rank 0; "
                    "give every rank the same options, text and version"
                )

    def backend(
        self, name: str, model: ModelConfig, config: TrainConfig, state: TrainState
    ) -> Backend:
        """The backend; with several ranks, all of them begin with rank 0's state."""
        if self.group.size == 1:
            return make_backend(name, model, config, state)
        own = replace(config, threads=max(1, config.threads // self.n_beside))
        made = make_backend(name, model, own, state, group=self.group)
        held = made.state()
        weights = [held.params, held.moments]
        self.agree({"state after it was sent": [digest_of(weights), held.step]})
        return made

    def _begin_heartbeat(self) -> None:
        group = self.group
        beat = Heartbeat(group.rank, group.size, self._timeout, self._lost)
        if group.rank == 0:
            ring = ring_hosts() or [[]]
            group.broadcast([own_addresses(ring[0]), *beat.listen()])
            reached = True
        else:
            addresses, port, token = group.broadcast(None)
            reached = beat.connect(addresses, port, token)
        heard = group.gather(np.array([int(reached)], np.int32))[:, 0]
        self._heartbeat = beat
        if group.rank == 0 and not heard.all():
            ranks = ", ".join(map(str, np.flatnonzero(heard == 0)))
            click.echo(
                f"Rank {ranks} cannot reach rank 0 beside the ring (a firewall?): that one stands "
                "still would not be noticed.",
                err=True,
            )

    def _lost(self, why: str) -> None:
        """From the heartbeat's thread: end this process if it does not end by itself, as it does
        not while MLX waits for a rank that stands still."""
        time.sleep(LEAVE_SECONDS)
        if not self._over:
            self._over = True
            self._restore()
            click.echo(f"Error: {self._sentence(why)}", err=True)
            os._exit(1)

    def _explain(self, error: RuntimeError) -> None:
        """RankError in place of MLX's own, where the heartbeat knows of a loss."""
        why = self._heartbeat.why(self._timeout) if self._heartbeat else ""
        if why and not self._over:
            self._over = True
            sentence = self._sentence(why)
            self.part(1)
            raise RankError(sentence) from error

    def _sentence(self, why: str) -> str:
        return ". ".join(filter(None, (why, self._last_words())))


def compute(run: Run, backend: Backend, team: Team) -> int:
    """Take part in the steps of a run that rank 0 shows and saves; the exit code."""
    try:
        for report in train(run, backend, None, team.group.should_stop):
            if isinstance(report, EndLog):
                break
    except TrainingDiverged:
        return 1  # on every rank alike; rank 0 says so
    team.part()
    return team.exit_code


def _joined() -> Group:
    try:
        from mlx_randygpt.backends.ranks.ring import join
    except ImportError as error:
        raise RankError(
            "several ranks need MLX, for its collectives, with the NumPy backend too: "
            f"pip install 'mlx-randygpt[cpu]' ({error})"
        ) from error
    noted = False

    def waiting(seconds: float) -> None:
        nonlocal noted
        if seconds > WAITING_NOTE_SECONDS and not noted:
            noted = True
            click.echo(f"Rank {os.environ.get('MLX_RANK', '?')}: waiting for the others.", err=True)
        if seconds > JOIN_SECONDS:
            raise RankError(f"the other ranks did not come within {JOIN_SECONDS} s; start all")

    group = join(waiting)
    return group if group.size > 1 else SingleRank()


def _hold(lifeline: int) -> None:
    """Stop when the launcher is gone, however it ended: the run saves, and nothing is left over.
    A byte from it is the number of a signal, for a rank on another machine."""
    while content := os.read(lifeline, 1):
        os.kill(os.getpid(), content[0])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(JOIN_SECONDS)
    os._exit(143)


def start_message(saved: Checkpoint | None, run: Run) -> dict[str, Any]:
    """What the other ranks begin with, as rank 0 tells it; its arrays follow later."""
    return {
        "checkpoint": to_strict_json(header_of(saved)) if saved else None,
        "paths": run.data["paths"],
        "tokenizer": run.tokenizer.to_json(),
    }


def checkpoint_without_arrays(header: dict[str, Any]) -> Checkpoint:
    """Rank 0's checkpoint from its header; the weights are first ones, of the right shapes."""
    model, config = (
        dataclass_from_json(ModelConfig, header["model"]),
        dataclass_from_json(TrainConfig, header["train"]),
    )
    step, backend, data = header_facts(header)
    state = TrainState(step, initial_params(model, config.seed), {})
    reached = progress_from_json(header["progress"])
    return Checkpoint(model, config, reached, header["tokenizer"], data, backend, state)


def agreed_values(run: Run, backend_name: str) -> dict[str, Any]:
    """What must be the same on every rank."""
    return {
        "version of mlx-randygpt": __version__,
        "backend": backend_name,
        "text": [run.data["sha256"], len(run.train_tokens), len(run.val_tokens)],
        "tokenizer": run.tokenizer.to_json(),
        "model": asdict(run.model),
        "setting": asdict(replace(run.train, threads=0)),
        "step of the checkpoint": to_strict_json(asdict(run.progress)),
        "--respect-documents": run.documents is not None,
    }


def digest_of(values: Any) -> str:
    """A digest of arrays in nested dicts."""
    found = hashlib.sha256()

    def read(value: Any) -> None:
        if isinstance(value, np.ndarray):
            found.update(np.ascontiguousarray(value).data)
            return
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in sorted(inner):
            found.update(f"\n{name}\n".encode())
            read(part)

    read(values)
    return found.hexdigest()


def digest(value: Any) -> NDArray[np.int32]:
    """Eight numbers that stand for a value JSON can hold."""
    text = json.dumps(value, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(text).digest(), np.int32)
