"""Low-rank adapters in NumPy: the ordinary model runs on W = W₀ + s·B·A, made once per step.

From the gradient of W follow those of the adapters; AdamW updates them, and W₀ stays as it is.

Legend: A (r, in), B (out, r), W and W₀ (out, in); s = alpha / r.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from mlx_randygpt.backends.numpy import optimizer
from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import adapted_matrices, adapter_scale, adapter_shapes, base_config
from mlx_randygpt.state import Array, Batch, Params, TrainState


class NumpyLora(NumpyBackend):
    """A NumpyBackend of the merged model, whose `adapters` are what is trained."""

    def __init__(
        self, model: ModelConfig, train: TrainConfig, state: TrainState, dtype: type = np.float32
    ) -> None:
        assert train.optimizer == "adamw", "settings.fine_tuning sees to it"
        self._matrices, self._scale = adapted_matrices(model), adapter_scale(model)
        shapes = adapter_shapes(model)
        self.adapters, self._adapter_m, self._adapter_v = (_zeros(shapes, dtype) for _ in range(3))
        super().__init__(base_config(model), train, state, dtype)

    def restore(self, state: TrainState) -> None:
        self.step = state.step
        for name, view in self.params.items():
            view[...] = state.params[name]
        self._frozen = {name: self.params[name].copy() for name in self._matrices}
        for arrays, values in (
            (self.adapters, state.params),
            (self._adapter_m, state.moments.get("m", {})),
            (self._adapter_v, state.moments.get("v", {})),
        ):
            for name, array in arrays.items():
                array[...] = values.get(name, 0)
        self._merge()

    def loss(self, batch: Batch) -> float:
        self._merge()  # a check moves the adapters
        return super().loss(batch)

    def loss_and_grads(self, batch: Batch) -> tuple[float, Params]:
        """The gradients are those of the adapters; nothing else is trained."""
        self._merge()
        loss, grads = super().loss_and_grads(batch)
        return loss, self._adapter_grads(grads)

    def state(self) -> TrainState:
        params = {**self.params, **self._frozen, **self.adapters}
        named = {"m": self._adapter_m, "v": self._adapter_v}
        return TrainState(self.step, _copies(params), {k: _copies(m) for k, m in named.items()})

    def _clipped_update(self, lr: float) -> float:
        """AdamW on the adapters; the norm is of their gradients alone."""
        grads = self._adapter_grads(self._grads)
        norm = float(np.sqrt(sum(np.vdot(g, g) for g in grads.values())))
        if np.isfinite(norm):
            clip = optimizer.clip_scale(norm, self.train.grad_clip)
            list(self._pool.map(partial(self._update_adapter, grads, clip, lr), grads))
            self._merge()
        return norm

    def _update_adapter(self, grads: Params, clip: float, lr: float, name: str) -> None:
        grads[name] *= clip
        optimizer.adamw(
            *(views[name].reshape(-1)
              for views in (self.adapters, grads, self._adapter_m, self._adapter_v)),
            t=self.step + 1, lr=lr, decay=self.train.weight_decay, config=self.train,
        )  # fmt: skip

    def _adapter_grads(self, grads: Params) -> Params:
        """dA = s·Bᵀ·dW (r, in) and dB = s·dW·Aᵀ (out, r)."""
        found: dict[str, Array] = {}
        for name, (a, b) in self._matrices.items():
            found[a] = self._scale * (self.adapters[b].T @ grads[name])
            found[b] = self._scale * (grads[name] @ self.adapters[a].T)
        return found

    def _merge(self) -> None:
        """W = W₀ + s·B·A, where the model and the decoder read it."""
        for name, (a, b) in self._matrices.items():
            w = self.params[name]
            np.matmul(self.adapters[b], self.adapters[a], out=w)
            w *= self._scale
            w += self._frozen[name]


def _copies(params: Params) -> Params:
    return {name: np.array(array, np.float32) for name, array in params.items()}


def _zeros(shapes: dict[str, tuple[int, ...]], dtype: type) -> Params:
    return {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
