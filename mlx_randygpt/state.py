"""The state of a run, batches of token windows, and the random numbers of a (seed, purpose, index).

Legend: B batch, T time (block_size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Params = dict[str, Array]

IGNORED = -1  # a target that is not counted


@dataclass(frozen=True)
class TrainState:
    """A consistent copy of the state of one run: float32 arrays that nothing else writes to.

    `moments["m"]` has an entry per trained weight, `moments["v"]` those of
    `model.second_moment_shapes`. Missing moments are zero.
    """

    step: int  # optimizer steps taken
    params: Params
    moments: dict[str, Params]


class Tokens(Protocol):
    """Token ids (n,): an array, or a file that is read in windows."""

    def __len__(self) -> int: ...
    def __getitem__(self, positions: NDArray[np.int64], /) -> Array: ...
    def __array__(self) -> Array: ...


@dataclass(frozen=True)
class Batch:
    """B windows of T tokens, given by where they start in `tokens`; nothing is copied before use.

    A backend can keep `tokens` on its device and gather there, as long as it sees the same array.
    """

    tokens: Tokens  # (n,) integers, a whole split
    starts: NDArray[np.int64]  # (B,)
    block_size: int  # T
    row: int = 0  # of its first window, if this is a part of a batch

    @staticmethod
    def of(windows: Array) -> Batch:
        """Return the batch with inputs windows[:, :-1] and targets windows[:, 1:]; (B, T+1) ids."""
        size = windows.shape[1]
        starts = np.arange(len(windows), dtype=np.int64) * size
        return Batch(np.ascontiguousarray(windows, dtype=np.int32).reshape(-1), starts, size - 1)

    def x(self) -> NDArray[np.int32]:
        """Return the inputs, (B, T); past the end of `tokens` the last token is repeated."""
        positions = np.minimum(self._positions(), len(self.tokens) - 1)
        return self.tokens[positions].astype(np.int32)

    def y(self) -> NDArray[np.int32]:
        """Return the targets, (B, T): the token after each input, IGNORED past the end."""
        positions = self._positions() + 1
        inside = positions < len(self.tokens)
        targets = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int32)
        return np.where(inside, targets, IGNORED)

    def n_targets(self) -> int:
        """Count the targets that are not IGNORED."""
        return int(np.clip(len(self.tokens) - 1 - self.starts, 0, self.block_size).sum())

    def _positions(self) -> NDArray[np.int64]:
        return self.starts[:, None] + np.arange(self.block_size)  # (B, T)


PURPOSES = ("init", "batch", "dropout", "sample", "check")


def rng(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """Return the random generator of (seed, purpose, index); no generator needs to be saved."""
    key = (PURPOSES.index(purpose), *index)
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=key)))
