"""Less memory for a fifth more products: a chunk that keeps the input of each layer, and makes
one layer's activations again when its backward pass asks for them (Chen et al. 2016,
arXiv:1604.06174).

The arithmetic is repeated to the bit and dropout draws from copies of its generators, so gradients
are those of a chunk that keeps everything.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np

from mlx_randygpt.backends.numpy_model import Chunk, Randoms
from mlx_randygpt.state import Array, Params


def recomputing(kind: type[Chunk]) -> type[Chunk]:
    """Such a chunk of this architecture."""
    return type(f"Recomputing{kind.__name__}", (Recomputing, kind), {})


class Recomputing(Chunk):
    """What is different; every layer shares one `Activations`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        n_layer = self.config.n_layer
        self.layers = self.layers[:1] * n_layer  # the others were never written to
        self.inputs: list[Array] = [np.empty_like(self.x) for _ in range(n_layer - 1)]
        self.draws: list[Randoms | None] = [None] * n_layer

    def _layer(self, w: Params, i: int, x: Array, t: int, random: Randoms | None) -> None:
        if i < len(self.inputs):  # nothing comes between the last layer's two passes
            self.inputs[i][: len(x)], self.draws[i] = x, deepcopy(random)
        super()._layer(w, i, x, t, random)

    def _layer_backward(self, w: Params, i: int, dx: Array, t: int, dropped: bool) -> None:
        if i < len(self.inputs):
            self._again(w, i, len(dx), t)
        super()._layer_backward(w, i, dx, t, dropped)

    def _again(self, w: Params, i: int, n: int, t: int) -> None:
        """The forward pass of layer i but for its last product, which nothing reads."""
        act, x, random = self.layers[i], self.inputs[i][:n], self.draws[i]
        x += self._drop(self._attention(w, i, act, x, n // t, t), act.mask1, random)
        inputs = self._read(w, f"h.{i}.ln_2", x, act.read2, t)
        self._activate(self._product(w, f"h.{i}.mlp.c_fc", inputs, act.r[:n]), self.wide[:n])
        self._drop(self.branch[:n], act.mask2, random)
