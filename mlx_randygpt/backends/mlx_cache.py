"""Keys and values of the last S = block_size positions, in a ring per layer, in MLX.

Position p lives in slot p % S. Rotary keys are stored already turned, so where in the ring they
lie is of no account. Knows nothing of the model beyond the sizes of its heads.

Legend: B streams, H heads, D head size, S slots, T new tokens, n positions seen before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np


class LayerCache:
    """The ring of one layer; `offset` is n. `last` is what attention and MLP read of the
    position before, (B, 1, C/2) each, under token shift; None before the first."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.offset = 0
        self.last: list[mx.array | None] = [None, None]
        self.keys = mx.zeros(shape)  # (B, H, S, D)
        self.values = mx.zeros(shape)  # (B, H, S, D)

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store k and v (B, H, T, D); what the new queries read, as `MLXCache.mask` orders it."""
        read = push(self.keys, k, self.offset), push(self.values, v, self.offset)
        self.offset += k.shape[2]
        return read


def push(ring: mx.array, new: mx.array, n: int) -> mx.array:
    """Write `new` (B, H, T, D) into the ring in place; what its queries read, (B, H, <= S+T, D).

    One token reads the ring it was written to. Several read the ring as it was and themselves,
    for the last of them may take the slot of a key that the first still sees.
    """
    size, t = ring.shape[2], new.shape[2]
    if t == 1:
        slot = n % size
        ring[:, :, slot : slot + 1] = new
        return ring[:, :, : n + 1]
    read = mx.concatenate([ring[:, :, :n], new], axis=2)
    ring[:, :, mx.arange(n, n + t) % size] = new
    return read


class MLXCache:
    """A ring per layer, and which of its keys a new query sees."""

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int]) -> None:
        self.layers = [LayerCache(shape) for _ in range(n_layer)]
        self.size = shape[2]

    @property
    def length(self) -> int:
        """Tokens seen so far, by every stream alike."""
        return self.layers[0].offset

    def arrays(self) -> list[mx.array]:
        """Everything stored, to be evaluated."""
        stored = ((layer.keys, layer.values, *layer.last) for layer in self.layers)
        return [array for arrays in stored for array in arrays if array is not None]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these streams, in this order; a row may be named twice or not at all."""
        for layer in self.layers:
            assert all(0 <= row < len(layer.keys) for row in rows), "MLX checks no bounds"
            layer.keys = layer.keys[mx.array(rows)]
            layer.values = layer.values[mx.array(rows)]
            layer.last = [x if x is None else x[mx.array(rows)] for x in layer.last]

    def mask(self, t: int) -> Any:
        """Which keys each of T new queries sees: the last S up to its own; for the attention."""
        n = self.length
        if t == 1 or n == 0:
            return "causal" if t > 1 else None
        slots = np.arange(min(n, self.size))
        held = n - 1 - (n - 1 - slots) % self.size  # the position in each slot
        queries = np.arange(n, n + t)
        keys = np.concatenate([held, queries])
        age = queries[:, None] - keys  # (T, <= S+T)
        return mx.array((age >= 0) & (age < self.size))
