"""Operations of a training step whose gradients are written by hand, from MLX operations alone.

Autodiff would take more GPU kernels and more passes over memory for the same numbers; the formulas
are derived in docs/numerics.md. `Steps` are the parts that kernels of our own can replace.

Legend: B batch, T time, C n_embd, H heads, D = C/H, F = 4C, N = B·T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.mlx.embedding import embed, with_gradient
from mlx_randygpt.backends.mlx.model import Operations, rms, rotate, shift

HIDDEN = {mx.float16: -6e4}  # the score of a later position, if not -1e30


@dataclass(frozen=True)
class Steps:
    """Parts of norm + token shift and of attention, each beside its gradient."""

    norm_shift: Callable[..., mx.array]
    norm_shift_gradient: Callable[..., mx.array]
    norm_rotate: Callable[..., mx.array]
    norm_rotate_gradient: Callable[..., mx.array]
    attend: Callable[..., Sequence[mx.array]]
    attend_gradient: Callable[..., Sequence[mx.array]]


def squared_relu(h: mx.array) -> mx.array:
    """Return max(h, 0)², (B, T, F)."""
    return with_gradient(lambda h: h * mx.maximum(h, 0), squared_relu_gradient)(h)


def squared_relu_gradient(h: mx.array, da: mx.array, _: mx.array) -> mx.array:
    """Return 2 max(h, 0) da; if it shared a term with the forward pass, that would be kept."""
    return (h + mx.abs(h)) * da


def add_product(x: mx.array, a: mx.array, w: mx.array) -> mx.array:
    """Return x + a wᵀ for x (B, T, out), a (B, T, in) and w (out, in), in one pass."""
    return with_gradient(lambda x, a, w: mx.addmm(x, a, w.T), add_product_gradient)(x, a, w)


def add_product_gradient(primals: Any, dy: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    """Return dx, da and dw; MLX's own would make one dw per sequence."""
    _, a, w = primals
    return dy, dy @ w, dy.reshape(-1, dy.shape[-1]).T @ a.reshape(-1, a.shape[-1])


def norm_shift(x: mx.array) -> mx.array:
    """Return rms(x) (B, T, C), its first half of channels from the position before, or zero."""
    return _move(rms(x), 1) if x.shape[-1] % 2 == 0 else shift(rms(x), None, 0)


def norm_shift_gradient(x: mx.array, dy: mx.array, past: mx.array) -> mx.array:
    """Return dx (B, T, C) for dy, plus the gradient that came past the branch."""
    if x.shape[-1] % 2:
        return past + mx.vjp(norm_shift, [x], [dy])[1][0]
    return past + mx.vjp(rms, [x], [_move(dy, -1)])[1][0]


def norm_rotate(qkv: mx.array, n_head: int, qk_norm: bool, rope_base: float | None) -> mx.array:
    """Return queries and keys of qkv (B, T, 3C), normed and rotated, (B, 2H, T, D).

    Without a base, as with learned positions, they are not rotated.
    """
    return _norm_rotate(_heads(qkv, n_head)[:, :, : 2 * n_head], qk_norm, rope_base)


def norm_rotate_gradient(
    qkv: mx.array, dqk: mx.array, dv: mx.array, n_head: int, qk_norm: bool, rope_base: float | None
) -> mx.array:
    """Return dqkv (B, T, 3C) for dqk (B, 2H, T, D) and dv (B, H, T, D)."""
    qk = _heads(qkv, n_head)[:, :, : 2 * n_head]  # (B, T, 2H, D)
    _, (dx,) = mx.vjp(lambda x: _norm_rotate(x, qk_norm, rope_base), [qk], [dqk])
    return mx.concatenate([dx, dv.swapaxes(1, 2)], axis=2).reshape(qkv.shape)


def attend(qk: mx.array, qkv: mx.array) -> tuple[mx.array, mx.array]:
    """Return the mixed values (B, T, C), and the probabilities (B, H, T, T) for the gradient.

    Queries and keys are qk (B, 2H, T, D), values the last third of qkv (B, T, 3C).
    """
    q, k, v = _queries_keys_values(qk, qkv)
    bias = _causal_bias(q.shape[2], q.dtype)
    scores = mx.addmm(bias, q, k.swapaxes(-1, -2), alpha=q.shape[-1] ** -0.5)
    p = mx.softmax(scores, axis=-1, precise=True)  # (B, H, T, T)
    return (p @ v).swapaxes(1, 2).flatten(2), p


def attend_gradient(
    qk: mx.array, qkv: mx.array, y: mx.array, p: mx.array, dy: mx.array
) -> tuple[mx.array, mx.array]:
    """Return dqk (B, 2H, T, D) and dv (B, H, T, D) for dy (B, T, C)."""
    q, k, v = _queries_keys_values(qk, qkv)
    heads = (*dy.shape[:2], *q.shape[1::2])  # B, T, H, D
    delta = (dy * y).reshape(heads).sum(-1, keepdims=True).swapaxes(1, 2)  # (B, H, T, 1)
    dy = dy.reshape(heads).swapaxes(1, 2)  # (B, H, T, D)
    dv = p.swapaxes(-1, -2) @ dy
    ds = p * (dy @ v.swapaxes(-1, -2) - delta) * q.shape[-1] ** -0.5  # (B, H, T, T)
    return mx.concatenate([ds @ k, ds.swapaxes(-1, -2) @ q], axis=1), dv


def _norm_rotate(x: mx.array, qk_norm: bool, rope_base: float | None) -> mx.array:
    """Norm and rotate heads (B, T, n, D); return them as (B, n, T, D)."""
    x = (rms(x) if qk_norm else x).swapaxes(1, 2)
    return rotate(x, rope_base) if rope_base else x


def _heads(qkv: mx.array, n_head: int) -> mx.array:
    """Return a view of (B, T, 3C) as (B, T, 3H, D)."""
    return qkv.reshape(*qkv.shape[:2], 3 * n_head, -1)


def _queries_keys_values(qk: mx.array, qkv: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return views of all three, (B, H, T, D) each."""
    n_head = qk.shape[1] // 2
    v = _heads(qkv, n_head)[:, :, 2 * n_head :].swapaxes(1, 2)
    return qk[:, :n_head], qk[:, n_head:], v


@lru_cache(maxsize=8)
def _causal_bias(t: int, dtype: mx.Dtype) -> mx.array:
    """Return what is added to scores, (T, T): zero, and at later positions almost -infinity."""
    hidden = np.triu(np.ones((t, t), np.float32), 1)
    return mx.array(hidden * HIDDEN.get(dtype, -1e30)).astype(dtype)


def _move(x: mx.array, by: int) -> mx.array:
    """Move the first half of channels of x (B, T, C) by one position, +1 or -1; zero comes in."""
    b, t, c = x.shape
    source, inside = _sources(b, t, by)
    halves = x.reshape(b * t * 2, c // 2)[source].reshape(b, t, 2, c // 2)
    return mx.where(inside, halves, mx.array(0, x.dtype)).reshape(x.shape)


@lru_cache(maxsize=8)
def _sources(b: int, t: int, by: int) -> tuple[mx.array, mx.array]:
    """Return the half row that each of B·T·2 comes from, and whether there is one, (T, 2, 1)."""
    source = np.arange(b * t * 2, dtype=np.uint32).reshape(b, t, 2)
    inside = np.ones((t, 2, 1), bool)
    if by == 1:
        source[:, 1:, 0] = source[:, :-1, 0].copy()
        inside[0, 0] = False
    else:
        source[:, :-1, 0] = source[:, 1:, 0].copy()
        inside[-1, 0] = False
    return mx.array(source.reshape(-1)), mx.array(inside)


MLX_STEPS = Steps(
    norm_shift=norm_shift,
    norm_shift_gradient=norm_shift_gradient,
    norm_rotate=norm_rotate,
    norm_rotate_gradient=norm_rotate_gradient,
    attend=attend,
    attend_gradient=attend_gradient,
)


def branch(x: mx.array, steps: Steps = MLX_STEPS) -> tuple[mx.array, mx.array]:
    """Return x and the token shift of its norm: both, so that their gradients meet in one step."""

    def gradient(x: mx.array, cotangents: Any, _: Any) -> mx.array:
        past, dy = cotangents
        return steps.norm_shift_gradient(x, dy, past)

    x, y = with_gradient(lambda x: (x, steps.norm_shift(x)), gradient)(x)
    return x, y


def attention(
    qkv: mx.array, n_head: int, *, qk_norm: bool, rope_base: float | None, steps: Steps = MLX_STEPS
) -> mx.array:
    """Return causal self-attention (B, T, C) of stacked queries, keys and values (B, T, 3C)."""
    switches = n_head, qk_norm, rope_base

    def forward(qkv: mx.array) -> tuple[mx.array, ...]:
        qk = steps.norm_rotate(qkv, *switches)  # (B, 2H, T, D)
        return (*steps.attend(qk, qkv), qk)

    def gradient(qkv: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        (dy, *_), (y, kept, qk) = cotangents, outputs
        dqk, dv = steps.attend_gradient(qk, qkv, y, kept, dy)
        return steps.norm_rotate_gradient(qkv, dqk, dv, *switches)

    y: mx.array = with_gradient(forward, gradient)(qkv)[0]
    return y


TRAINING = Operations(
    embed=embed,
    branch=branch,
    attention=attention,
    squared_relu=squared_relu,
    add_product=add_product,
)
