"""Recomputing activations: a block keeps only its input and runs again for its gradient.

The method is that of Chen et al. 2016, arXiv:1604.06174.

With MLX's own `nn.utils.checkpoint` the gradients of weights are evaluated after everything else,
and the factors of those products are kept for all layers at once. Here the gradient that goes on to
the layer below waits for those of this layer's weights: of 117 MB for 16 layers 23 stay, not 82.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def recompute(block: nn.Module) -> Callable[..., mx.array]:
    """Return the block as a function of the same arguments, for calls without a cache."""
    names, weights = zip(*tree_flatten(block.trainable_parameters()), strict=True)

    def run(x: mx.array, mask: Any, cache: Any, keys: Sequence[Any]) -> mx.array:
        def forward(keys: Any, x: mx.array, *weights: mx.array) -> mx.array:
            block.update(tree_unflatten(list(zip(names, weights, strict=True))))
            return block(x, mask, cache, keys)

        @mx.custom_function  # type: ignore[untyped-decorator]
        def first_pass(x: mx.array, *weights: mx.array) -> mx.array:
            return forward(keys, x, *weights)

        @first_pass.vjp  # type: ignore[untyped-decorator]
        def backward(primals: Any, cotangent: mx.array, _: mx.array) -> list[mx.array]:
            dropout_keys = [keys] if isinstance(keys, mx.array) else []
            # Delay the second pass until its gradient is needed. The keys are delayed too, or a
            # compiled step would take both drawings of dropout for one and keep the masks.
            delayed = mx.depends([*primals, *dropout_keys], [cotangent])
            second_pass = partial(forward, delayed.pop() if dropout_keys else keys)
            _, (dx, *dweights) = mx.vjp(second_pass, delayed, [cotangent])
            (dx,) = mx.depends([dx], dweights)
            return [dx, *dweights]

        out: mx.array = first_pass(x, *weights)
        return out

    return run
