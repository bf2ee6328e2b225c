"""The Metal kernels' own text, compiled as C++ and run on the CPU, against NumPy in float64.

What a Mac adds is its compiler, its arithmetic and simdgroups that run at once: the self-test looks
at those. Measured over all shapes: 1e-7 for the norms, 8e-7 for attention after QK-norm, over 1,024
positions, and 1.9e-6 without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx

from mlx_randygpt.backends.mlx import kernels
from mlx_randygpt.backends.numpy import ops
from mlx_randygpt.check import distance
from mlx_randygpt.model import rope_rates
from mlx_randygpt.state import Array, rng

BASE = 500.0  # of the rotary positions
BOUND = 1e-5
SHAPES = [  # B, T, H, D
    (1, 8, 1, 8),  # one tile
    (2, 16, 4, 16),
    (3, 24, 3, 8),  # an odd number of heads, and a row of tiles that fills no threadgroup
    (2, 40, 5, 24),  # lanes that are left over in a row
    (1, 72, 1, 64),
    (2, 32, 2, 128),  # large heads
    (1, 256, 2, 16),
    pytest.param((1, 1024, 1, 8), marks=pytest.mark.slow),
]
pytestmark = [pytest.mark.usefixtures("on_cpu"), pytest.mark.parametrize("shape", SHAPES)]


def normal(*shape: int, seed: int = 0) -> Array:
    """Return normal numbers (B, T, ...) that float32 can hold, in float64.

    The first positions are so small that a norm has to add its epsilon.
    """
    numbers = rng(seed, "check").standard_normal(shape, dtype=np.float32).astype(np.float64)
    numbers[:, :3] *= 2**-7
    return numbers


def single(*arrays: Array) -> list[mx.array]:
    return [mx.array(array.astype(np.float32)) for array in arrays]


def shifted_norm(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return NumPy's norm and token shift of x (B, T, C), and the gradient as a function of dy."""
    rows = x.reshape(-1, x.shape[-1])
    normed, inv_rms, y = np.empty_like(rows), np.empty(len(rows)), np.empty_like(x)
    ops.rms_norm(rows, normed, inv_rms)
    ops.token_shift(normed.reshape(x.shape), y)

    def backward(dy: Array) -> Array:
        dx = dy.copy()
        ops.token_shift_backward(dx)
        ops.rms_norm_backward(dx.reshape(rows.shape), normed, inv_rms, np.empty_like(rows))
        return dx

    return y, backward


def rotated_heads(qkv: Array, n_head: int) -> tuple[Array, Callable[[Array, Array], Array]]:
    """Return NumPy's qk (B, 2H, T, D) of qkv (B, T, 3C), and dqkv as a function of dqk and dv."""
    b, t, c = *qkv.shape[:2], qkv.shape[2] // 3
    rates = rope_rates(c // n_head, BASE)
    phases = ops.rope_phases(np.arange(t), rates, 2 * n_head, np.float64)
    per_head = (b * t, 2 * n_head, c // n_head)
    x = qkv[..., : 2 * c].reshape(per_head)
    normed, inv_rms = np.empty_like(x), np.empty(per_head[:2])
    ops.rms_norm(x, normed, inv_rms)
    rotated = normed.reshape(b, t, 2 * c).copy()
    ops.rotate(rotated, phases)

    def backward(dqk: Array, dv: Array) -> Array:
        dqkv = np.concatenate([dqk, dv], axis=1).swapaxes(1, 2).reshape(qkv.shape)
        dx = dqkv[..., : 2 * c].copy()
        ops.rotate(dx, phases.conj())
        ops.rms_norm_backward(dx.reshape(per_head), normed, inv_rms, np.empty_like(x))
        return np.concatenate([dx, dqkv[..., 2 * c :]], axis=-1)

    return ops.heads(rotated, 2 * n_head, 1)[0], backward


def attention(
    qk: Array, v: Array, qk_norm: bool
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """Return NumPy's y (B, T, C) of qk (B, 2H, T, D) and v (B, T, C), and dqk and dv of dy."""
    (b, t, c), h = v.shape, qk.shape[1] // 2
    packed = np.concatenate([qk.swapaxes(1, 2).reshape(b, t, 2 * c), v], axis=-1)
    probs, y, scratch = np.zeros((b, h, t, t)), np.empty_like(v), np.empty((b, h, c // h, t))
    ops.attention(packed, scratch, probs, y, qk_norm=qk_norm)

    def backward(dy: Array) -> tuple[Array, Array]:
        dqkv = np.empty_like(packed)
        ops.attention_backward(dy, y, packed, probs, scratch, np.empty_like(probs), dqkv)
        dq, dk, dv = ops.heads(dqkv, h, 3)
        return np.concatenate([dq, dk], axis=1), dv

    return y, backward


def agree(ours: Sequence[mx.array], expected: Sequence[Array]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert distance(np.array(one), other) < BOUND


def test_norm_and_token_shift_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    b, t, h, d = shape
    x, dy, past = (normal(b, t, h * d, seed=seed) for seed in range(3))
    y, backward = shifted_norm(x)
    agree([kernels.norm_shift(*single(x))], [y])
    agree([kernels.norm_shift_gradient(*single(x, dy, past))], [backward(dy) + past])


def test_norm_and_rotation_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    b, t, h, d = shape
    qkv, dqk = normal(b, t, 3 * h * d), normal(b, 2 * h, t, d, seed=1)
    dv = normal(b, h, t, d, seed=2)
    qk, backward = rotated_heads(qkv, h)
    agree([kernels.norm_rotate(*single(qkv), h, BASE)], [qk])
    agree([kernels.norm_rotate_gradient(*single(qkv, dqk, dv), BASE)], [backward(dqk, dv)])


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_that_of_numpy(shape: tuple[int, ...], qk_norm: bool) -> None:
    b, t, h, d = shape
    qkv, dy = normal(b, t, 3 * h * d), normal(b, t, h * d, seed=1)
    # scores of up to 400 overflow, and rise and fall along the keys
    qk = rotated_heads(qkv, h)[0] if qk_norm else 3 * d**0.25 * normal(b, 2 * h, t, d, seed=2)
    y, backward = attention(qk, qkv[..., 2 * h * d :], qk_norm)
    ours = kernels.attend(*single(qk, qkv), qk_norm)
    agree(ours[:1], [y])
    agree(kernels.attend_gradient(*single(qk, qkv), *ours, *single(dy)), backward(dy))
