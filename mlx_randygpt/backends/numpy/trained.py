"""What a NumPy backend trains: all weights of the model, or adapters beside frozen ones.

The backend computes the gradient of every weight of the whole model; from it, `AllWeights` or
`Adapters` updates what is trained. Both own the moments.

Legend: A (r, in), B (out, r), W and W₀ (out, in); s = alpha / r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from math import prod

import numpy as np

from mlx_randygpt.backends.numpy import optimizer
from mlx_randygpt.backends.numpy.model import copy_to_float32, flat_views
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import (
    Parameter,
    adapted_matrices,
    adapter_scale,
    adapter_shapes,
    parameters,
    second_moment_shapes,
)
from mlx_randygpt.state import Array, Params, TrainState


@dataclass(frozen=True)
class Threads:
    """The pool of a backend's worker threads."""

    pool: Executor
    n: int

    def run(self, jobs: list[Callable[[], None]]) -> None:
        """Run the jobs on all threads and wait for them."""
        list(self.pool.map(lambda job: job(), jobs))

    def slices(self, start: int, stop: int) -> list[slice]:
        """Divide start..stop into one slice per thread."""
        edges = np.linspace(start, stop, self.n + 1).astype(int)
        return [slice(a, b) for a, b in pairwise(edges)]


@dataclass(frozen=True)
class Weights:
    """One array per weight, each a view of one flat vector."""

    flat: Array
    views: Params

    @staticmethod
    def zeros(model: ModelConfig, dtype: type) -> Weights:
        """Return zeros of the model's shapes."""
        return Weights(*flat_views(model, dtype))

    def load(self, values: Params) -> None:
        """Copy these values, zero for a weight without one."""
        load(self.views, values)


class AllWeights:
    """Every weight of the model is trained.

    AdamW works on ranges of the flat vectors, Muon on stacks of matrices, both on all threads.
    """

    def __init__(
        self, model: ModelConfig, train: TrainConfig, whole: Weights, grads: Weights
    ) -> None:
        self.params = whole.views
        self._model, self._train = model, train
        self._w, self._g = whole, grads
        dtype = whole.flat.dtype.type
        self._m, self._v = Weights.zeros(model, dtype), Weights.zeros(model, dtype)
        self._parameters = parameters(model)

    def restore(self, state: TrainState) -> None:
        """Copy the weights and moments of this state."""
        self._w.load(state.params)
        self._m.load(state.moments.get("m", {}))
        self._v.load(state.moments.get("v", {}))

    def merge(self) -> None:
        """Leave the whole model as it is: it is what is trained."""

    def gradients(self) -> Params:
        """Return a copy of the gradient of each trained weight."""
        return {name: g.copy() for name, g in self._g.views.items()}

    def update(self, step: int, lr: float, threads: Threads) -> float:
        """Update the weights unless the gradient is not finite; return its norm before clipping.

        `step` counts the steps taken before this one.
        """
        norm = float(np.sqrt(np.dot(self._g.flat, self._g.flat)))
        if np.isfinite(norm):
            scale = optimizer.clip_scale(norm, self._train.grad_clip)
            np.multiply(self._g.flat, scale, out=self._g.flat)
            threads.run([*self._adamw_jobs(step, lr, threads), *self._muon_jobs(lr, threads)])
        return norm

    def state(self, step: int) -> TrainState:
        """Return a copy in float32 of weights and moments."""
        shapes = second_moment_shapes(self._model, self._train)
        v = {name: corner(self._v.views[name], shape) for name, shape in shapes.items()}
        params, m, v = copy_to_float32([self.params, self._m.views, v])
        return TrainState(step, params, {"m": m, "v": v})

    def _uses_muon(self, parameter: Parameter) -> bool:
        return self._train.optimizer == "muon" and parameter.is_block_matrix

    def _adamw_jobs(self, step: int, lr: float, threads: Threads) -> Iterator[Callable[[], None]]:
        """Yield AdamW's jobs on ranges of the flat vectors.

        Adjacent parameters with the same decay form one range. Gains and biases do not decay.
        """
        train = self._train
        if train.optimizer == "muon":
            lr *= train.adamw_lr_ratio
        stop = 0
        kinds = groupby(self._parameters, lambda p: (self._uses_muon(p), len(p.shape) > 1))
        for (by_muon, is_matrix), neighbours in kinds:
            start, stop = stop, stop + sum(p.size for p in neighbours)
            for part in [] if by_muon else threads.slices(start, stop):
                yield partial(
                    optimizer.adamw,
                    self._w.flat[part],
                    self._g.flat[part],
                    (self._m.flat[part], self._v.flat[part]),
                    t=step + 1,
                    lr=lr,
                    decay=train.weight_decay if is_matrix else 0.0,
                    config=train,
                )

    def _muon_jobs(self, lr: float, threads: Threads) -> Iterator[Callable[[], None]]:
        """Yield jobs on stacks of matrices of one shape, at least one job for each thread."""
        by_shape: dict[tuple[int, ...], list[tuple[Array, ...]]] = {}
        for parameter in filter(self._uses_muon, self._parameters):
            arrays = [each.views[parameter.name] for each in (self._w, self._g, self._m, self._v)]
            arrays[3] = corner(arrays[3], parameter.neurons_shape)
            stacks = (array.reshape(parameter.stacked, -1, array.shape[1]) for array in arrays)
            for matrices in zip(*stacks, strict=True):
                by_shape.setdefault(matrices[0].shape, []).append(matrices)
        for shape, group in by_shape.items():
            size = max(1, min(-(-len(group) // threads.n), optimizer.STACK // prod(shape)))
            for start in range(0, len(group), size):
                yield partial(
                    optimizer.muon,
                    *zip(*group[start : start + size], strict=True),
                    lr=lr,
                    config=self._train,
                )


class Adapters:
    """Adapters are trained by AdamW: the model computes with W = W₀ + s·B·A, merged once per step.

    From the gradient of W follow those of A and B; W₀ stays as it is.
    """

    def __init__(
        self, model: ModelConfig, train: TrainConfig, whole: Weights, grads: Weights
    ) -> None:
        assert train.optimizer == "adamw", "adapters are trained by adamw"
        self._train, self._w, self._g = train, whole, grads
        self._matrices, self._scale = adapted_matrices(model), adapter_scale(model)
        shapes, dtype = adapter_shapes(model), whole.flat.dtype
        self.params, self._m, self._v = (
            {name: np.zeros(shape, dtype) for name, shape in shapes.items()} for _ in range(3)
        )
        self._frozen: Params = {}  # W₀ of the adapted matrices

    def restore(self, state: TrainState) -> None:
        """Copy the frozen weights, the adapters and the moments of this state, and merge."""
        self._w.load(state.params)
        self._frozen = {name: self._w.views[name].copy() for name in self._matrices}
        load(self.params, state.params)
        load(self._m, state.moments.get("m", {}))
        load(self._v, state.moments.get("v", {}))
        self.merge()

    def merge(self) -> None:
        """Write W = W₀ + s·B·A to the weights that the model and the decoder read."""
        for name, (a, b) in self._matrices.items():
            w = self._w.views[name]
            np.matmul(self.params[b], self.params[a], out=w)
            w *= self._scale
            w += self._frozen[name]

    def gradients(self) -> Params:
        """Return the gradients dA = s·Bᵀ·dW (r, in) and dB = s·dW·Aᵀ (out, r)."""
        grads: Params = {}
        for name, (a, b) in self._matrices.items():
            dw = self._g.views[name]
            grads[a] = self._scale * (self.params[b].T @ dw)
            grads[b] = self._scale * (dw @ self.params[a].T)
        return grads

    def update(self, step: int, lr: float, threads: Threads) -> float:
        """Update the adapters unless their gradient is not finite; return its norm before clipping.

        `step` counts the steps taken before this one.
        """
        grads = self.gradients()
        norm = float(np.sqrt(sum(np.vdot(g, g) for g in grads.values())))
        if np.isfinite(norm):
            clip = optimizer.clip_scale(norm, self._train.grad_clip)
            threads.run([partial(self._adamw, name, grads[name], clip, step, lr) for name in grads])
            self.merge()
        return norm

    def state(self, step: int) -> TrainState:
        """Return a copy in float32 of frozen weights, adapters and moments."""
        params = {**self._w.views, **self._frozen, **self.params}
        moments = {"m": self._m, "v": self._v}
        return TrainState(
            step, _copies(params), {kind: _copies(arrays) for kind, arrays in moments.items()}
        )

    def _adamw(self, name: str, grad: Array, clip: float, step: int, lr: float) -> None:
        grad *= clip
        train = self._train
        optimizer.adamw(
            self.params[name].reshape(-1),
            grad.reshape(-1),
            (self._m[name].reshape(-1), self._v[name].reshape(-1)),
            t=step + 1,
            lr=lr,
            decay=train.weight_decay,
            config=train,
        )


def load(views: Params, values: Params) -> None:
    """Copy these values into the arrays, zero for a name without one."""
    for name, view in views.items():
        view[...] = values.get(name, 0)


def corner(v: Array, shape: tuple[int, ...]) -> Array:
    """Return the part of `v` that is a second moment; Muon's is its first column or row."""
    return v[tuple(slice(size) for size in shape)]


def _copies(params: Params) -> Params:
    return {name: np.array(array, np.float32) for name, array in params.items()}
