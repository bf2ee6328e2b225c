"""What a model is, apart from any backend: names and shapes of its weights, their first values,
the state of a run, a batch of token windows, and the random numbers of a (seed, purpose, step).

Legend: B batch, T time (block_size), C n_embd, H heads, D = C/H, F = 4C, V vocab, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Params = dict[str, Array]

IGNORED = -1  # a target that is not counted


@dataclass(frozen=True)
class TrainState:
    """A consistent copy of one run: float32 arrays that nobody else writes to.

    `moments["m"]` has an entry per weight; `moments["v"]` only for those AdamW updates.
    Empty moments mean zeros.
    """

    step: int  # optimizer steps taken
    params: Params
    moments: dict[str, Params]


@dataclass(frozen=True)
class Batch:
    """B windows of T tokens, named by where they start in `tokens`; nothing is copied before use.

    A backend may keep `tokens` on its device and gather there, as long as it sees the same array.
    """

    tokens: Array  # (n,) integers, a whole split
    starts: NDArray[np.int64]  # (B,)
    block_size: int  # T
    row: int = 0  # of its first window, where this is a part of a batch

    @staticmethod
    def of(windows: Array) -> Batch:
        """The batch whose inputs are windows[:, :-1] and targets windows[:, 1:]; (B, T+1) ids."""
        size = windows.shape[1]
        starts = np.arange(len(windows), dtype=np.int64) * size
        return Batch(np.ascontiguousarray(windows, dtype=np.int32).reshape(-1), starts, size - 1)

    def x(self) -> NDArray[np.int32]:
        """Inputs, (B, T); past the end of `tokens` the last token is repeated."""
        at = np.minimum(self._positions(), len(self.tokens) - 1)
        return self.tokens[at].astype(np.int32)

    def y(self) -> NDArray[np.int32]:
        """Targets, (B, T): the token after each input, IGNORED past the end of `tokens`."""
        at = self._positions() + 1
        inside = at < len(self.tokens)
        return np.where(inside, self.tokens[np.where(inside, at, 0)].astype(np.int32), IGNORED)

    def n_targets(self) -> int:
        """How many targets count."""
        return int(np.clip(len(self.tokens) - 1 - self.starts, 0, self.block_size).sum())

    def _positions(self) -> NDArray[np.int64]:
        return self.starts[:, None] + np.arange(self.block_size)  # (B, T)


PURPOSES = ("init", "batch", "dropout", "sample", "check")


def rng(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """The generator of (seed, purpose, index): nothing random has a state worth saving."""
    key = (PURPOSES.index(purpose), *index)
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=key)))
