"""Keys and values of the last S = block_size positions, in a ring per layer and row, in MLX.

Position p lives in slot p % S. Rotary keys are stored already turned, so where in the ring they
lie is of no account. Every token is read with the same shapes, whatever came before, so that MLX
compiles its pass once. Knows nothing of the model beyond the sizes of its heads.

Legend: B streams, C n_embd, H heads, D head size, S slots, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Layer = list[mx.array]  # keys and values (B, H, S, D), and what attention and MLP read last


class MLXCache:
    """What L layers keep: keys and values, (B, H, S, D) each, and under token shift what attention
    and MLP read of the position before, (B, 1, C/2) each."""

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int]) -> None:
        b, h, _, d = shape
        shapes = (shape, shape, (b, 1, h * d // 2), (b, 1, h * d // 2))
        self.layers: list[Layer] = [[mx.zeros(shape) for shape in shapes] for _ in range(n_layer)]
        self.lengths: NDArray[np.int64] = np.zeros(b, np.int64)

    def reset(self, rows: slice) -> None:
        """Empty these rows; keys past a row's length are never read."""
        self.lengths[rows] = 0
        for *_, attention, mlp in self.layers:
            attention[rows], mlp[rows] = 0, 0

    def move(self, source: int, target: int) -> None:
        """Let row `target` hold what row `source` does."""
        for layer in self.layers:
            for array in layer:
                array[target] = array[source]
        self.lengths[target] = self.lengths[source]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these streams, in this order; a row may be named twice or not at all."""
        assert all(0 <= row < len(self.lengths) for row in rows), "MLX checks no bounds"
        at = mx.array(rows)
        self.layers = [[array[at] for array in layer] for layer in self.layers]
        self.lengths = self.lengths[list(rows)]

    def read(self, rows: slice) -> list[Layer]:
        """What these rows hold."""
        if self._are_all(rows):
            return self.layers
        return [[array[rows] for array in layer] for layer in self.layers]

    def write(self, rows: slice, layers: list[Layer], t: int) -> None:
        """Let these rows hold this, T tokens more. All of them give the old arrays away, so that
        MLX writes where they stood."""
        self.lengths[rows] += t
        if self._are_all(rows):
            self.layers = layers
            return
        for kept, new in zip(self.layers, layers, strict=True):
            for array, part in zip(kept, new, strict=True):
                array[rows] = part

    def _are_all(self, rows: slice) -> bool:
        return rows.indices(len(self.lengths)) == (0, len(self.lengths), 1)


class LayerPass:
    """One layer's rows while T tokens pass through it, as `mlx_model.GPT` asks for them: one
    token after rows of any `lengths` (B,), or T > 1 into empty ones."""

    def __init__(self, layer: Layer, lengths: mx.array, t: int) -> None:
        self._keys, self._values, *self.last = layer
        self._slots = (lengths % self._keys.shape[2])[:, None, None, None]  # (B, 1, 1, 1)
        self.offset = lengths if t == 1 else 0

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store k and v (B, H, T, D); what the new queries read, behind `mask`."""
        self._keys, self._values = self._put(self._keys, k), self._put(self._values, v)
        return (self._keys, self._values) if k.shape[2] == 1 else (k, v)

    def layer(self) -> Layer:
        """What the layer holds afterwards."""
        return [self._keys, self._values, *(x[:, -1:] for x in self.last)]

    def _put(self, ring: mx.array, new: mx.array) -> mx.array:
        if new.shape[2] == 1:
            return mx.put_along_axis(ring, self._slots, new, axis=2)
        return mx.concatenate([new, ring[:, :, new.shape[2] :]], axis=2)


def mask(layers: list[Layer], lengths: mx.array, t: int) -> Any:
    """Which slots the queries of T new tokens see, for the attention."""
    if t > 1:
        return "causal"
    slots = mx.arange(layers[0][0].shape[2])
    return (slots <= lengths[:, None])[:, None, None]  # (B, 1, 1, S); all where the ring is full
