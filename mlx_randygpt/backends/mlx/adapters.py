"""Low-rank adapters in MLX: W = W₀ + s·B·A is made inside the differentiated function, so that
autodiff, the compiled step and the optimizer see the adapters as the only weights.

Legend: A (r, in), B (out, r), W and W₀ (out, in); s = alpha / r.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.mlx.backend import MLXBackend
from mlx_randygpt.backends.mlx.optimizer import Weights
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import adapted_matrices, adapter_scale, adapter_shapes, base_config
from mlx_randygpt.state import Params, TrainState


class MLXLora(MLXBackend):
    """An MLXBackend of the merged model, whose weights are the adapters."""

    def __init__(self, model: ModelConfig, train: TrainConfig, state: TrainState) -> None:
        assert train.optimizer == "adamw", "settings.fine_tuning sees to it"
        self._matrices, self._scale = adapted_matrices(model), adapter_scale(model)
        self._shapes = adapter_shapes(model)
        self._frozen: Weights = {}
        super().__init__(base_config(model), train, state)

    def restore(self, state: TrainState) -> None:
        """Go on from these weights, moments and step."""
        self.step = state.step
        self._weights = {name: mx.array(state.params[name]) for name in self._shapes}
        self._freeze({n: w for n, w in state.params.items() if n not in self._shapes})
        self._moments = {
            kind: {
                name: mx.array(state.moments.get(kind, {}).get(name, np.zeros(shape, np.float32)))
                for name, shape in self._shapes.items()
            }
            for kind in ("m", "v")
        }
        self._merged = self._weights, self._merge(self._weights)

    def _freeze(self, weights: Params) -> None:
        """Hold these. Compiled steps have the arrays of the first time inside them: others would
        be a second copy that training does not see."""
        if not self._frozen:
            self._frozen = {name: mx.array(weight) for name, weight in weights.items()}
            return
        same = (np.array_equal(self._frozen[n], w, equal_nan=True) for n, w in weights.items())
        assert all(same), "frozen weights stay what they were"

    def state(self) -> TrainState:
        """A copy of step, weights and moments in float32; waits for the device."""
        adapters = super().state()
        frozen = {name: np.array(weight) for name, weight in self._frozen.items()}
        return TrainState(self.step, frozen | adapters.params, adapters.moments)

    def _mean_loss(self, weights: Weights, x: mx.array, y: mx.array, keys: Any) -> mx.array:
        return super()._mean_loss(self._merge(weights), x, y, keys)

    def _whole(self) -> Weights:
        """What the adapters make of the frozen weights, kept, for decoding asks at every token."""
        if self._merged[0] is not self._weights:
            self._merged = self._weights, self._merge(self._weights)
        return self._merged[1]

    def _merge(self, adapters: Weights) -> Weights:
        merged = dict(self._frozen)
        for name, (a, b) in self._matrices.items():
            merged[name] = merged[name] + self._scale * (adapters[b] @ adapters[a])
        return merged
