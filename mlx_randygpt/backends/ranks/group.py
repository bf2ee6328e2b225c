"""The group of ranks that train one model together: shares of a batch, and collectives.

`SingleRank` is the group of one process; `ring.RingGroup` connects several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.backends.base import Backend
from mlx_randygpt.config import UserError
from mlx_randygpt.state import Array, Batch, TrainState

LAUNCHERS = {  # the variable with the rank, and those that can hold the number of ranks
    "MLX_RANK": ("MLX_WORLD_SIZE",),
    "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_SIZE",),
    "PMIX_RANK": ("SLURM_NTASKS", "PMI_SIZE"),
    "PMI_RANK": ("PMI_SIZE", "SLURM_NTASKS"),
}
RESYNC_STEPS = 1000
STOP_CODES = (1, 129, 130, 143)  # exit codes a rank can ask for: closed pipe, SIGHUP, INT, TERM


class RankError(UserError):
    """Raised if the ranks cannot begin together, or if one of them is lost."""


class Group(Protocol):
    """One rank among `size` ranks that train one model together.

    A collective is a call that every rank makes, in the same order.
    """

    rank: int
    size: int
    requested_exit_code: Callable[[], int]  # the code this rank wants to stop with; 0: go on
    agreed_exit_code: int  # the code that all ranks have agreed to stop with; 0: go on

    def should_stop(self) -> bool:
        """Return whether all ranks have agreed to stop; the same answer at the same step."""

    def broadcast(self, value: Any) -> Any:
        """Broadcast rank 0's JSON-serialisable value to every rank (collective)."""

    def gather(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the numbers (n,) of every rank, (size, n) (collective)."""

    def share(self, batch: Batch) -> Batch:
        """Return this rank's own rows of a batch."""

    def total(self, value: float) -> float:
        """Return the sum of every rank's value (collective)."""

    def sum(self, flat: Array) -> None:
        """Add the other ranks' float32 vectors (n,) to this one, in place (collective)."""

    def mean(self, loss: Any, grads: Any, weight: float) -> tuple[Any, Any]:
        """Return the loss and gradients summed over all ranks, each times its weight (collective).

        `loss` and the values of `grads` are MLX arrays; the weights of all ranks add up to 1.
        """

    def same_state(self, state: TrainState) -> TrainState:
        """Return rank 0's state on every rank (collective)."""


class SingleRank:
    """The group of a run with one process: every collective is the identity."""

    rank, size, agreed_exit_code = 0, 1, 0

    def __init__(self) -> None:
        self.requested_exit_code: Callable[[], int] = lambda: 0

    def should_stop(self) -> bool:
        """Return whether this process wants to stop."""
        self.agreed_exit_code = self.requested_exit_code()
        return self.agreed_exit_code != 0

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value

    def gather(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the numbers as one row, (1, n)."""
        return numbers[None]

    def share(self, batch: Batch) -> Batch:
        """Return the whole batch."""
        return batch

    def total(self, value: float) -> float:
        """Return the value."""
        return value

    def sum(self, flat: Array) -> None:
        """Leave the vector as it is."""

    def mean(self, loss: Any, grads: Any, weight: float) -> tuple[Any, Any]:
        """Return both as they are; the weight of the only rank is 1."""
        return loss, grads

    def same_state(self, state: TrainState) -> TrainState:
        """Return the state."""
        return state


SINGLE = SingleRank()  # the default of a backend, which never asks it to stop


def share(batch: Batch, rank: int, size: int) -> Batch:
    """Return this rank's own rows of a batch, contiguous; the shares differ by at most one row.

    A rank without rows gets a window past the end, which has no targets that count.
    """
    n = len(batch.starts)
    first, last = n * rank // size, n * (rank + 1) // size
    if first == last:
        return replace(batch, starts=np.array([len(batch.tokens)], np.int64), row=first, ends=None)
    return batch.part(first, last)


def resync(backend: Backend) -> None:
    """Restore rank 0's state on every rank, every RESYNC_STEPS steps (collective).

    Gradients are the same everywhere, but processors of different kinds round an update
    differently.
    """
    if backend.step % RESYNC_STEPS == 0:
        backend.restore(backend.state())


def is_ranked(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher has started this process as one of several ranks.

    Raises RankError if the launcher's variables are invalid: MLX's ring would wait endlessly if it
    is started alone or with a rank that is not a number.
    """
    name = next((name for name in LAUNCHERS if name in environment), None)
    if name is None or any(environment.get(size) == "1" for size in LAUNCHERS[name]):
        return False
    rank = environment[name]
    if not rank.isdigit():
        raise RankError(f"{name}={rank!r} is not a number; the first rank is 0")
    return "MLX_HOSTFILE" not in environment or len(ring_hosts(environment)) > 1


def ring_hosts(environment: Mapping[str, str] = os.environ) -> list[list[str]]:
    """Read the addresses of each rank from the file MLX_HOSTFILE, [["ip:port", …], …].

    Returns [] if the variable is not set. Raises RankError if the file is invalid or does not list
    this rank.
    """
    import json

    path = environment.get("MLX_HOSTFILE", "")
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
        hosts = json.loads(text) if text.strip() else []  # mlx.launch -n 1 leaves it empty
    except OSError as error:
        raise RankError(f"MLX_HOSTFILE={path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RankError(f"MLX_HOSTFILE={path} is not JSON: {error}") from error
    if not isinstance(hosts, list) or not all(
        isinstance(host, list) and host and all(isinstance(at, str) for at in host)
        for host in hosts
    ):
        raise RankError(f'MLX_HOSTFILE={path} is not a list such as [["10.0.0.1:5000"], …]')
    rank = int(environment.get("MLX_RANK", "0"))
    if len(hosts) > 1 and rank >= len(hosts):
        raise RankError(
            f"MLX_RANK={rank}, but {path} lists {len(hosts)} ranks: 0 to {len(hosts) - 1}"
        )
    return hosts
