"""A trained model with its matrices in 8 or 4 bits: it writes and is scored, and trains no more.

Numbers of a row share a scale and an offset in groups of 64 or 32 (float32, affine, as
`mx.quantize` makes them); products are those of `mx.quantized_matmul`. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_randygpt.backends.base import BackendError
from mlx_randygpt.backends.mlx.backend import MLXBackend
from mlx_randygpt.backends.mlx.model import FEW_ROWS
from mlx_randygpt.backends.mlx.optimizer import Weights
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.state import Batch, TrainState

GROUPS = (64, 32)  # 128 loses a third more at 4 bits and saves a tenth: docs/numerics.md
BITS = (8, 4)


class QuantizedMLX(MLXBackend):
    """An MLX backend for `loss` and `logits`, all in float32 but for the matrices: those of the
    blocks, the head, and an embedding of more than FEW_ROWS tokens."""

    def __init__(
        self, model: ModelConfig, train: TrainConfig, state: TrainState, bits: int
    ) -> None:
        assert bits in BITS
        self._bits = bits
        super().__init__(model, train, state)

    def restore(self, state: TrainState) -> None:
        """Take these weights; the float ones are not kept."""
        super().restore(state)
        super()._bind(self._weights)
        self._weights, self._moments = {}, {"m": {}, "v": {}}
        nn.quantize(self._model, class_predicate=self._how)
        mx.eval(self._model.parameters())
        mx.clear_cache()

    def train_step(self, batches: Sequence[Batch], lr: float) -> NoReturn:
        """Refused."""
        raise BackendError("quantised weights are not trained; leave --quantize out")

    def loss_and_grads(self, batch: Batch) -> NoReturn:
        """Refused."""
        raise BackendError("quantised weights have no gradients; leave --quantize out")

    def state(self) -> TrainState:
        """The weights that it computes with, in float32."""
        weights = dict(tree_flatten(self._model.parameters()))
        for path, layer in self._model.named_modules():
            if "scales" in layer:
                scales, biases = weights.pop(f"{path}.scales"), weights.pop(f"{path}.biases")
                packed = weights[f"{path}.weight"]
                weights[f"{path}.weight"] = mx.dequantize(
                    packed, scales, biases, layer.group_size, layer.bits
                )
        return TrainState(self.step, {name: np.array(w) for name, w in weights.items()}, {})

    def weight_bytes(self) -> int:
        """What the weights take, scales and offsets included."""
        return sum(array.nbytes for _, array in tree_flatten(self._model.parameters()))

    def _bind(self, weights: Weights) -> None:
        """The model holds its weights."""

    def _how(self, path: str, layer: Any) -> bool | dict[str, int]:
        """Whether and in which groups this layer is quantised."""
        matrix = isinstance(layer, nn.Linear)
        if not matrix and not (isinstance(layer, nn.Embedding) and len(layer.weight) > FEW_ROWS):
            return False
        width = layer.weight.shape[1]
        group = next((size for size in GROUPS if width % size == 0), None)
        if group is None:
            raise BackendError(
                f"--quantize takes numbers in groups of {' or '.join(map(str, GROUPS))}, and "
                f"{path} has rows of {width}; it needs a model whose n_embd 32 divides"
            )
        return {"group_size": group, "bits": self._bits}
