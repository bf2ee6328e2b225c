"""Several ranks connected by `mx.distributed`: sums over all of them, in buckets.

All ranks make the same collectives in the same order. If a rank is lost, MLX raises RuntimeError or
waits endlessly; the heartbeat reports it.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.backends.ranks.group import STOP_CODES, RankError, share
from mlx_randygpt.state import Array, Batch, TrainState

BUCKET = 1 << 22  # numbers summed at once, 16 MB: docs/ranks.md has the trials
JOIN_POLL_SECONDS = 0.1
Grads = dict[str, mx.array]


def join(waiting: Callable[[float], None]) -> RingGroup:
    """Join the group of ranks that the environment describes, and return it.

    Waits for all ranks; `waiting(seconds)` is called meanwhile and can raise. MLX waits on another
    thread, so that this one still receives signals.
    """
    results: list[Any] = []

    def connect() -> None:
        try:
            results.append(mx.distributed.init(strict=True))
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    polls = 0
    while thread.is_alive():
        thread.join(JOIN_POLL_SECONDS)
        polls += 1
        waiting(polls * JOIN_POLL_SECONDS)
    if isinstance(results[0], RuntimeError):
        raise RankError(
            f"the ranks could not be connected: {results[0]}; a launcher's variables, such as "
            "MLX_RANK, are set: without them this process trains alone"
        )
    return RingGroup(results[0])


class RingGroup:
    """The `group.Group` of several ranks."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = int(group.rank()), int(group.size())
        self.requested_exit_code: Callable[[], int] = lambda: 0
        self.agreed_exit_code = 0
        self._metal = mx.metal.is_available() and mx.default_device() == mx.gpu
        self._flags: deque[mx.array] = deque()  # of steps the device may still be busy with

    def should_stop(self) -> bool:
        """Return whether all ranks have agreed to stop."""
        self._read_flags(keep=1)  # never wait for the current step
        return self.agreed_exit_code != 0

    def broadcast(self, value: Any) -> Any:
        """Broadcast rank 0's JSON-serialisable value to every rank."""
        text = json.dumps(value).encode() if self.rank == 0 else b""
        size = int(self.gather(np.array([len(text)], np.int32))[0, 0])
        content = np.zeros(size, np.uint8)
        if self.rank == 0:
            content[:] = np.frombuffer(text, np.uint8)
        return json.loads(bytes(self._summed(content)))

    def gather(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the numbers (n,) of every rank, (size, n)."""
        rows = np.zeros((self.size, len(numbers)), np.int32)
        rows[self.rank] = numbers
        return self._summed(rows)

    def share(self, batch: Batch) -> Batch:
        """Return this rank's own rows."""
        return share(batch, self.rank, self.size)

    def total(self, value: float) -> float:
        """Return the sum of every rank's value; requests to stop travel with it."""
        sums = self._summed(np.array([value, *self._stop_requests()], np.float32))
        self._flags.append(mx.array(sums[1:]))
        self._read_flags(keep=0)
        return float(sums[0])

    def sum(self, flat: Array) -> None:
        """Add the other ranks' float32 vectors to this one, in place."""
        for at in range(0, len(flat), BUCKET):
            part = flat[at : at + BUCKET]
            part[:] = self._summed(part)

    def mean(self, loss: mx.array, grads: Grads, weight: float) -> tuple[mx.array, Grads]:
        """Return the loss and gradients summed over all ranks, each times its weight.

        Buckets are summed in the order in which the backward pass finishes them, then the loss and
        the requests to stop.
        """
        groups = [*buckets({name: grads[name].size for name in reversed(grads)})]
        flats = [mx.concatenate([grads[n].reshape(-1) for n in names]) * weight for names in groups]
        requests = mx.array(self._stop_requests(), mx.float32)
        *sums, last = self._in_turn(
            [*flats, mx.concatenate([(loss * weight).reshape(1), requests])]
        )
        self._flags.append(last[1:])
        summed: Grads = {}
        for names, flat in zip(groups, sums, strict=True):
            ends = np.cumsum([grads[name].size for name in names]).tolist()
            for name, part in zip(names, mx.split(flat, ends[:-1]), strict=True):
                summed[name] = part.reshape(grads[name].shape)
        return last[0], {name: summed[name] for name in grads}

    def _in_turn(self, arrays: list[mx.array]) -> list[mx.array]:
        """Return the sums over all ranks, in this order on each rank, whatever their graph is.

        Metal kills a program whose GPU has waited for about five seconds, as it would for a slower
        rank: there the host waits, and the GPU gets what has arrived.
        """
        sums: list[mx.array] = []
        for array in arrays:
            ready = array
            if sums:
                with mx.stream(mx.cpu if self._metal else mx.default_device()):
                    (ready,) = mx.depends([array], [sums[-1]])
            sums.append(mx.distributed.all_sum(ready, group=self._group))
        if self._metal:
            mx.eval(sums)
        return sums

    def same_state(self, state: TrainState) -> TrainState:
        """Return rank 0's state on every rank; the others' can be empty."""
        groups = {"": state.params, **state.moments}
        shapes = {kind: {n: a.shape for n, a in group.items()} for kind, group in groups.items()}
        step, shapes = self.broadcast([state.step, shapes])
        same = {
            kind: {
                name: self._copied(groups.get(kind, {}).get(name), shape)
                for name, shape in arrays.items()
            }
            for kind, arrays in shapes.items()
        }
        return TrainState(step, same.pop(""), same)

    def _copied(self, array: Array | None, shape: Sequence[int]) -> Array:
        """Return rank 0's array of this shape."""
        flat = np.zeros(prod(shape), np.float32)
        if self.rank == 0:
            assert array is not None
            flat[:] = array.reshape(-1)
        self.sum(flat)
        return flat.reshape(shape)

    def _stop_requests(self) -> list[int]:
        requested = self.requested_exit_code()
        return [int(requested == code) for code in STOP_CODES]

    def _read_flags(self, keep: int) -> None:
        """Read the requests to stop of all but the latest `keep` collectives; the first counts."""
        while len(self._flags) > keep:
            requests = np.array(self._flags.popleft())
            if not self.agreed_exit_code and requests.any():
                self.agreed_exit_code = STOP_CODES[int(requests.argmax())]

    def _summed(self, array: Array) -> Array:
        total = mx.distributed.all_sum(mx.array(array), group=self._group)
        mx.eval(total)
        return np.array(total, copy=False)


def buckets(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Group names, in their order, into buckets of about BUCKET values."""
    names: list[str] = []
    for name in sizes:
        names.append(name)
        if sum(sizes[n] for n in names) >= BUCKET:
            yield names
            names = []
    if names:
        yield names
