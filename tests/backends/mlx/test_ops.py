"""Operations with gradients of their own against the plain ones and MLX's autodiff.

Legend: B batch, T time, C n_embd, H heads, F = 4C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx

from mlx_randygpt.backends.mlx.model import PLAIN, Attention, ModelArgs
from mlx_randygpt.backends.mlx.ops import TRAINING, attention
from mlx_randygpt.check import distance
from mlx_randygpt.state import rng


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(rng(seed, "check").standard_normal(shape), mx.float32)


def outcome(function: Callable[..., Any], *inputs: mx.array) -> list[Any]:
    """Return the function's values and the gradients of a weighted sum of them."""
    values = function(*inputs)
    values = [values] if isinstance(values, mx.array) else list(values)
    cotangents = [normal(*value.shape, seed=9 + i) for i, value in enumerate(values)]
    _, grads = mx.vjp(lambda *x: function(*x), list(inputs), cotangents)
    return [np.array(array) for array in (*values, *grads)]


def assert_same(ours: Any, plain: Any, *inputs: mx.array) -> None:
    """Measured: 4e-7 at most."""
    for a, b in zip(outcome(ours, *inputs), outcome(plain, *inputs), strict=True):
        assert a.shape == b.shape
        assert distance(a, b) < 2e-6


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 1, 4), (2, 4, 7), (2, 1, 2)])
def test_norm_and_shift_are_the_plain_ones(shape: tuple[int, ...]) -> None:
    assert_same(TRAINING.branch, PLAIN.branch, normal(*shape))


def test_the_squared_relu_is_the_plain_one() -> None:
    h = normal(2, 3, 16)
    h[0, 0, :4] = 0
    assert_same(TRAINING.squared_relu, PLAIN.squared_relu, h)


def test_a_sum_with_a_product_is_the_plain_one() -> None:
    x, a, w = normal(2, 3, 5), normal(2, 3, 4, seed=1), normal(5, 4, seed=2)
    assert_same(TRAINING.add_product, PLAIN.add_product, x, a, w)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("rope_base", [10000.0, 100.0, None])
@pytest.mark.parametrize(("t", "h", "d"), [(7, 3, 4), (1, 2, 6), (5, 2, 3), (4, 1, 8)])
def test_attention_is_the_plain_one(
    qk_norm: bool, rope_base: float | None, t: int, h: int, d: int
) -> None:
    args = ModelArgs(
        vocab_size=3,
        block_size=t,
        n_layer=1,
        n_head=h,
        n_embd=h * d,
        position="rope" if rope_base else "learned",
        rope_base=rope_base or 1.0,
        qk_norm=qk_norm,
    )
    plain = Attention(args)
    assert_same(
        lambda qkv: attention(qkv, h, qk_norm=qk_norm, rope_base=rope_base),
        lambda qkv: plain.attend(qkv, "causal", None),
        normal(2, t, 3 * h * d),
    )
