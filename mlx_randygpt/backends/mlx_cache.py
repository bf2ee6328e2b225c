"""Keys and values of the last S = block_size positions, in a ring per layer and row, in MLX.

Position p lives in slot p % S. Rotary keys are stored already turned, so where in the ring they
lie is of no account. Knows nothing of the model beyond the sizes of its heads.

Legend: B streams, H heads, D head size, S slots, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.backends.base import ALL


class MLXCache:
    """Keys and values of L layers, (B, H, S, D) each, and under token shift what attention and
    MLP read of the position before, (B, 1, C/2) each."""

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int]) -> None:
        b, h, _, d = shape
        self.keys = [mx.zeros(shape) for _ in range(n_layer)]
        self.values = [mx.zeros(shape) for _ in range(n_layer)]
        self.last = [[mx.zeros((b, 1, h * d // 2)) for _ in range(2)] for _ in range(n_layer)]
        self.lengths: NDArray[np.int64] = np.zeros(b, np.int64)

    def reset(self, rows: slice) -> None:
        """Empty these rows; keys past a row's length are never read."""
        self.lengths[rows] = 0
        for last in self.last:
            last[0][rows], last[1][rows] = 0, 0

    def move(self, source: int, target: int) -> None:
        """Let row `target` hold what row `source` does."""
        for array in self.arrays():
            array[target] = array[source]
        self.lengths[target] = self.lengths[source]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these streams, in this order; a row may be named twice or not at all."""
        assert all(0 <= row < len(self.lengths) for row in rows), "MLX checks no bounds"
        at = mx.array(rows)
        self.keys, self.values = [k[at] for k in self.keys], [v[at] for v in self.values]
        self.last = [[x[at] for x in last] for last in self.last]
        self.lengths = self.lengths[list(rows)]

    def arrays(self) -> list[mx.array]:
        """Everything stored."""
        return [*self.keys, *self.values, *(x for last in self.last for x in last)]


class LayerRows:
    """Some rows of one layer while T tokens pass through it, as `mlx_model.GPT` asks for them."""

    def __init__(self, cache: MLXCache, layer: int, rows: slice, offset: int | mx.array) -> None:
        self._cache, self._layer, self._rows = cache, layer, rows
        self.offset = offset  # tokens seen: an int where the rows are of one length, else (B,)
        self.last = [x if rows == ALL else x[rows] for x in cache.last[layer]]

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store k and v (B, H, T, D); the slots that the new queries read."""
        rings = self._cache.keys[self._layer], self._cache.values[self._layer]
        return self._push(rings[0], k), self._push(rings[1], v)

    def keep(self) -> None:
        """Store the end of `last` for the next token."""
        for old, new in zip(self._cache.last[self._layer], self.last, strict=True):
            old[self._rows] = new[:, -1:]

    def _push(self, ring: mx.array, new: mx.array) -> mx.array:
        size, t = ring.shape[2], new.shape[2]
        if isinstance(self.offset, int):
            slot, longest = self.offset % size, self.offset
            ring[self._rows, :, slot : slot + t] = new
        else:
            lengths = self._cache.lengths[self._rows]
            rows = np.arange(len(ring))[self._rows]
            ring[mx.array(rows), :, mx.array(lengths % size)] = new[:, :, 0]
            longest = int(lengths.max())
        return ring[self._rows, :, : longest + t]


def layer_rows(cache: MLXCache, rows: slice) -> list[LayerRows]:
    """These rows of every layer."""
    lengths = cache.lengths[rows]
    same = (lengths == lengths[0]).all()
    offset = int(lengths[0]) if same else mx.array(lengths.astype(np.int32))
    return [LayerRows(cache, i, rows, offset) for i in range(len(cache.keys))]


def mask(cache: MLXCache, rows: slice, t: int) -> Any:
    """Which slots the queries of T new tokens see; for the attention. T > 1 in empty rows only."""
    lengths, size = cache.lengths[rows], cache.keys[0].shape[2]
    if t > 1:
        return "causal"
    filled = np.minimum(lengths + 1, size)
    if filled.min() == filled.max():
        return None
    return mx.array(np.arange(filled.max()) < filled[:, None])[:, None, None]  # (B, 1, 1, S)
