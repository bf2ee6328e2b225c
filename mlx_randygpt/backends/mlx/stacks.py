"""The few arrays that hold all weights: matrices of one shape in a stack, the others in a vector.

An optimizer's step over a stack takes as many kernels as over one matrix, and a matrix of a stack
is a view, so that the model computes with named weights all the same. Moments lie as weights do.

Legend: N matrices of all layers in one stack, R rows, K columns of each, R <= K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_randygpt.state import Params

Weights = dict[str, mx.array]
Shapes = Mapping[str, tuple[int, ...]]

DECAYED, VECTORS = "decayed", "vectors"  # what AdamW updates: matrices, and the rest


class Stacks:
    """The place of each named weight: (N, R, K) for Muon's matrices, else in one of two vectors.

    `muon` maps the names of the weights that Muon updates to the number of matrices in each. A
    matrix higher than wide lies transposed in its stack.
    """

    def __init__(self, shapes: Shapes, muon: Mapping[str, int]) -> None:
        self._shapes, self._muon = shapes, muon
        self._names: dict[str, list[str]] = {}  # by stack
        for name, shape in shapes.items():
            self._names.setdefault(self._stack_of(name, shape), []).append(name)

    def pack(self, named: Weights) -> Weights:
        """Copy named weights, gradients or moments into stacks."""
        return self._pack(named, mx.concatenate)

    def load(self, named: Params) -> Weights:
        """Copy arrays from the host to stacks on the device."""
        return {stack: mx.array(x) for stack, x in self._pack(named, np.concatenate).items()}

    def unpack(self, stacks: Weights, shapes: Shapes | None = None) -> Weights:
        """Return named views of weights; of moments, with the shapes of those."""
        shapes = self._shapes if shapes is None else shapes
        views: Weights = {}
        for stack, names in self._names.items():
            start = 0
            for name in names:
                if name in shapes:
                    shape = shapes[name]
                    end = start + self._muon.get(name, prod(shape))
                    part = stacks[stack][start:end]
                    if self._is_transposed(name):
                        part = part.swapaxes(1, 2)
                    # squeezed, for a reshaped matrix that lies transposed would be a copy
                    is_one = part.shape[1:] == shape
                    views[name], start = part.squeeze(0) if is_one else part.reshape(shape), end
        return {name: views[name] for name in shapes}

    def scale(self, stack: str) -> Any:
        """Return √max(1, out / in) for the matrices of a stack, (N, 1, 1)."""
        ratios = []
        for name in self._names[stack]:
            (n_out, n_in), n = self._shapes[name], self._muon[name]
            ratios += [max(1.0, n_out // n / n_in) ** 0.5] * n
        return mx.array(ratios)[:, None, None]

    def _pack(self, named: Mapping[str, Any], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
        stacks = {
            stack: [self._part(name, named[name]) for name in names if name in named]
            for stack, names in self._names.items()
        }
        return {stack: join(parts) for stack, parts in stacks.items() if parts}

    def _part(self, name: str, x: Any) -> Any:
        """Return this weight as it lies in its stack."""
        if name not in self._muon:
            return x.reshape(-1)
        x = x.reshape(self._muon[name], -1, x.shape[1])  # (P, R, K)
        return x.swapaxes(1, 2) if self._is_transposed(name) else x

    def _stack_of(self, name: str, shape: tuple[int, ...]) -> str:
        if name not in self._muon:
            return DECAYED if len(shape) > 1 else VECTORS
        small, large = sorted((shape[0] // self._muon[name], shape[1]))
        return f"{small} × {large}"

    def _is_transposed(self, name: str) -> bool:
        n_out, n_in = self._shapes[name][0], self._shapes[name][-1]
        return name in self._muon and n_out // self._muon[name] > n_in
