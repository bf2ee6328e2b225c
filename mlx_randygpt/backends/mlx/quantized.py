"""A trained model with its matrices in 8 or 4 bits, for generation and evaluation only.

The values of a row share a scale and an offset in groups of 64 or 32 (float32, affine, as
`mx.quantize` makes them); products are those of `mx.quantized_matmul`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_randygpt.backends.base import ALL, BackendError
from mlx_randygpt.backends.mlx.backend import probe
from mlx_randygpt.backends.mlx.cache import MLXCache
from mlx_randygpt.backends.mlx.embedding import MAX_ONE_HOT_ROWS
from mlx_randygpt.backends.mlx.forward import Forward
from mlx_randygpt.backends.mlx.memory import HeldMemory
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import Array, Batch, Params

GROUP_SIZES = (64, 32)  # 128 loses a third more at 4 bits and saves a tenth: docs/numerics.md
BITS = (8, 4)


class QuantizedScorer:
    """A base.Scorer that computes in float32, from quantised matrices.

    Quantised are those of the blocks, the head, and an embedding of more than MAX_ONE_HOT_ROWS
    tokens. The float weights are not kept.
    """

    name = "mlx"

    def __init__(self, model: ModelConfig, params: Params, bits: int) -> None:
        assert bits in BITS
        assert not model.lora_rank, "adapters are merged before"
        device = probe()
        self.device = device.description
        self._memory = HeldMemory(on_gpu=device.has_gpu)
        self._bits = bits
        self._forward = Forward(model, on_gpu=device.has_gpu)
        self._forward.bind({name: mx.array(weight) for name, weight in params.items()})
        nn.quantize(self._forward.model, class_predicate=self._group_size_and_bits)
        mx.eval(self._forward.model.parameters())
        mx.clear_cache()
        self._loss = self._forward.compile(self._forward.loss)

    def loss(self, batch: Batch) -> float:
        """Return the mean cross-entropy in nats over the targets that count."""
        return float(self._loss(None, *self._forward.windows(batch), None))

    def new_cache(self, batch_size: int) -> MLXCache:
        """Return a cache with `batch_size` empty rows."""
        return self._forward.new_cache(batch_size)

    def logits(
        self, tokens: Array, cache: MLXCache, rows: slice = ALL, lengths: Array | None = None
    ) -> Array:
        """Append tokens (B, T) to these rows; return the last position's logits, (B, V) float32."""
        return self._forward.logits(None, tokens, cache, rows, lengths)

    def warm_up(self) -> None:
        """Do nothing: the first token is compiled."""

    @property
    def decoding(self) -> str:
        """How the next token is computed, for people."""
        return "compiled by MLX" if self._forward.on_gpu else "MLX"

    def memory_bytes(self) -> int:
        """Return the most memory held so far, as seen at each call; on a CPU, of the process."""
        return self._memory.read()

    def weight_bytes(self) -> int:
        """Return the size of the weights, scales and offsets included."""
        return sum(array.nbytes for _, array in tree_flatten(self._forward.model.parameters()))

    def _group_size_and_bits(self, path: str, layer: Any) -> bool | dict[str, int]:
        """Return how this layer is quantised, or False."""
        is_wide = isinstance(layer, nn.Embedding) and len(layer.weight) > MAX_ONE_HOT_ROWS
        if not (isinstance(layer, nn.Linear) or is_wide):
            return False
        width = layer.weight.shape[1]
        group_size = next((size for size in GROUP_SIZES if width % size == 0), None)
        if group_size is None:
            raise BackendError(
                f"--quantize stores values in groups of {' or '.join(map(str, GROUP_SIZES))}, and "
                f"{path} has rows of {width}; it needs a model whose n_embd is divisible by 32"
            )
        return {"group_size": group_size, "bits": self._bits}
