"""The state of a run, batches of token windows, and the random numbers of a (seed, purpose, index).

Legend: B batch, T time (block_size).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """Token ids (n,): an array, or a file that is read in windows.

    An id that is only read, never a target that counts, is stored as its complement `~id`, below 0.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, positions: NDArray[np.int64], /) -> Array: ...
    def __array__(self) -> Array: ...


def plain_ids(tokens: Array) -> Array:
    """Return the ids of tokens, whether they count as targets or not."""
    return tokens if tokens.dtype.kind == "u" else np.where(tokens < 0, ~tokens, tokens)


@dataclass(frozen=True)
class Batch:
    """B windows of T tokens, given by where they start in `tokens`; nothing is copied before use.

    A backend can keep `tokens` on its device and gather there, as long as it sees the same array.
    Tokens that are only read need `ends`: no target counts at or past the end of its window.
    """

    tokens: Tokens  # (n,) integers, a whole split
    starts: NDArray[np.int64]  # (B,)
    block_size: int  # T
    row: int = 0  # of its first window, if this is a part of a batch
    ends: NDArray[np.int64] | None = None  # (B,) None: every token counts, up to the end of all

    @staticmethod
    def of(windows: Array) -> Batch:
        """Return the batch with inputs windows[:, :-1] and targets windows[:, 1:]; (B, T+1) ids."""
        size = windows.shape[1]
        starts = np.arange(len(windows), dtype=np.int64) * size
        return Batch(np.ascontiguousarray(windows, dtype=np.int32).reshape(-1), starts, size - 1)

    def x(self) -> NDArray[np.int32]:
        """Return the inputs, (B, T); past the end of `tokens` the last token is repeated."""
        positions = np.minimum(self._positions(), len(self.tokens) - 1)
        return plain_ids(self.tokens[positions].astype(np.int32))

    def y(self) -> NDArray[np.int32]:
        """Return the targets, (B, T): the token after each input, or IGNORED."""
        positions = self._positions() + 1
        inside = positions < (len(self.tokens) if self.ends is None else self.ends[:, None])
        targets = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int32)
        return np.where(inside & (targets >= 0), targets, IGNORED)

    def n_targets(self) -> int:
        """Count the targets that are not IGNORED."""
        if self.ends is not None:
            return int((self.y() != IGNORED).sum())
        return int(np.clip(len(self.tokens) - 1 - self.starts, 0, self.block_size).sum())

    def part(self, first: int, last: int) -> Batch:
        """Return the windows `first` to `last` - 1."""
        ends = None if self.ends is None else self.ends[first:last]
        return replace(self, starts=self.starts[first:last], ends=ends, row=self.row + first)

    def _positions(self) -> NDArray[np.int64]:
        return self.starts[:, None] + np.arange(self.block_size)  # (B, T)


PURPOSES = ("init", "batch", "dropout", "sample", "check")


def rng(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """Return the random generator of (seed, purpose, index); no generator needs to be saved."""
    key = (PURPOSES.index(purpose), *index)
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=key)))
