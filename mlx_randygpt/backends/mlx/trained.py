"""What a step trains: all weights of a model, or low-rank adapters beside frozen ones.

W = W₀ + s·B·A is computed inside the differentiated function, so that autodiff, the compiled step
and the optimizer see the adapters as the only weights.

Legend: A (r, in), B (out, r), W and W₀ (out, in); s = alpha / r.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.mlx.stacks import Weights
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import (
    adapted_matrices,
    adapter_scale,
    adapter_shapes,
    base_config,
    parameter_shapes,
)
from mlx_randygpt.state import Params


class Trained(Protocol):
    """The weights that are trained, and how the whole model's weights follow from them."""

    model: ModelConfig  # what the whole weights are for
    shapes: dict[str, tuple[int, ...]]  # of the trained weights by name, in the published order
    frozen: Weights

    def freeze(self, params: Params) -> None:
        """Keep those of the weights that are not trained."""

    def merge(self, weights: Weights) -> Weights:
        """Compute the whole model's weights, differentiably."""

    def merged(self, weights: Weights) -> Weights:
        """Return the whole model's weights, kept from the last call with the same dict."""


class AllWeights:
    """Every weight is trained."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.shapes = parameter_shapes(model)
        self.frozen: Weights = {}

    def freeze(self, params: Params) -> None:
        """Keep nothing: no weight is frozen."""

    def merge(self, weights: Weights) -> Weights:
        """Return the weights."""
        return weights

    def merged(self, weights: Weights) -> Weights:
        """Return the weights."""
        return weights


class Adapters:
    """The adapters of a model are trained; its other weights are frozen."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = base_config(model)
        self.shapes = adapter_shapes(model)
        self.frozen: Weights = {}
        self._matrices, self._scale = adapted_matrices(model), adapter_scale(model)
        self._merged: tuple[Weights, Weights] = ({}, {})  # the adapters, and what they merged to

    def freeze(self, params: Params) -> None:
        """Keep the frozen weights of the first call.

        Compiled steps contain these arrays: others would be a second copy that training does not
        see, so that later calls only check that the values are the same.
        """
        values = {name: w for name, w in params.items() if name not in self.shapes}
        if not self.frozen:
            self.frozen = {name: mx.array(weight) for name, weight in values.items()}
            return
        same = (np.array_equal(self.frozen[n], w, equal_nan=True) for n, w in values.items())
        assert all(same), "frozen weights must not change"

    def merge(self, weights: Weights) -> Weights:
        """Compute W₀ + s·B·A for every adapted matrix."""
        merged = dict(self.frozen)
        for name, (a, b) in self._matrices.items():
            merged[name] = merged[name] + self._scale * (weights[b] @ weights[a])
        return merged

    def merged(self, weights: Weights) -> Weights:
        """Return the merged weights; they are kept, since decoding needs them at every token."""
        if self._merged[0] is not weights:
            self._merged = weights, self.merge(weights)
        return self._merged[1]
