"""Keys and values of the last S = block_size positions, in a ring per layer and row, in MLX.

Position p lives in slot p % S. Keys are stored after their rotation, so their order in the ring
does not matter. Every token is read with the same shapes, whatever came before, so that MLX
compiles its pass once.

Legend: B streams, C n_embd, H heads, D head size, S slots, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Layer = list[mx.array]  # keys and values (B, H, S, D), then the last inputs of attention and MLP


class MLXCache:
    """The cache of all layers: keys and values, (B, H, S, D) each.

    The token shift adds the inputs of attention and MLP at the last position, (B, 1, C) each.
    """

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int]) -> None:
        b, h, _, d = shape
        shapes = (shape, shape, (b, 1, h * d), (b, 1, h * d))
        self.layers: list[Layer] = [[mx.zeros(shape) for shape in shapes] for _ in range(n_layer)]
        self.lengths: NDArray[np.int64] = np.zeros(b, np.int64)

    def reset(self, rows: slice) -> None:
        """Empty these rows; keys past a row's length are never read."""
        self.lengths[rows] = 0
        for *_, attention, mlp in self.layers:
            attention[rows], mlp[rows] = 0, 0

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to row `target`."""
        for layer in self.layers:
            for array in layer:
                array[target] = array[source]
        self.lengths[target] = self.lengths[source]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row can be repeated or left out."""
        assert all(0 <= row < len(self.lengths) for row in rows), "MLX checks no bounds"
        at = mx.array(rows)
        self.layers = [[array[at] for array in layer] for layer in self.layers]
        self.lengths = self.lengths[list(rows)]

    def read(self, rows: slice) -> list[Layer]:
        """Return the arrays of these rows, layer by layer."""
        if self._are_all(rows):
            return self.layers
        return [[array[rows] for array in layer] for layer in self.layers]

    def write(self, rows: slice, layers: list[Layer], t: Any) -> None:
        """Replace the arrays of these rows after T more tokens, of all or of each (B,).

        If they are all rows, the old arrays are released, so that MLX can write in their place.
        """
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
    """One layer's rows while T tokens pass through it, with the interface that `model.GPT` needs.

    T is 1 after rows of any `lengths` (B,), or more for empty rows.
    """

    def __init__(self, layer: Layer, lengths: mx.array, t: int) -> None:
        self._keys, self._values, *self.last = layer
        self._slots = (lengths % self._keys.shape[2])[:, None, None, None]  # (B, 1, 1, 1)
        self.offset = lengths if t == 1 else 0

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store k and v (B, H, T, D); return the keys and values to attend to."""
        self._keys, self._values = self._put(self._keys, k), self._put(self._values, v)
        return (self._keys, self._values) if k.shape[2] == 1 else (k, v)

    def layer(self, ends: mx.array | None) -> Layer:
        """Return the layer's arrays after the pass, whose last tokens are at these `ends`."""
        return [self._keys, self._values, *(at_ends(x, ends) for x in self.last)]

    def _put(self, ring: mx.array, new: mx.array) -> mx.array:
        if new.shape[2] == 1:
            return mx.put_along_axis(ring, self._slots, new, axis=2)
        return mx.concatenate([new, ring[:, :, new.shape[2] :]], axis=2)


def at_ends(x: mx.array, ends: mx.array | None) -> mx.array:
    """Return x (B, T, C) at the positions `ends` (B,), by default the last, (B, 1, C)."""
    return x[:, -1:] if ends is None else mx.take_along_axis(x, ends[:, None, None], axis=1)


def attention_mask(layers: list[Layer], lengths: mx.array, t: int) -> Any:
    """Return the mask of the slots that the queries of T new tokens attend to."""
    if t > 1:
        return "causal"
    slots = mx.arange(layers[0][0].shape[2])
    return (slots <= lengths[:, None])[:, None, None]  # (B, 1, 1, S); all if the ring is full
