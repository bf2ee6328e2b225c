"""Kernels of our own for Metal: norm with token shift, QK-norm with rotation, causal attention.

Each replaces many of MLX's kernels, forward or backward. float32 only; T and D are multiples of 8.
The formulas are derived in docs/numerics.md. A body below is what `mx.fast.metal_kernel` takes:
inputs and outputs are pointers by name, sizes are constants. A simdgroup is 32 lanes that run in
step and can exchange values.

Legend: B batch, T time, C n_embd, H heads, D = C/H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.mlx.model import EPS
from mlx_randygpt.model import rope_rates

LANES = 32  # of a simdgroup
LANES_A_HEAD = 4
TILE = 8
GROUP = 4  # simdgroups that are started together
HEADER = f"#include <metal_simdgroup_matrix>\nconstant float EPS = {EPS}f;\n"

# One simdgroup a row of x (B, T, C).
_ROW = """
    const uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.y, t = row % T;
    const size_t start = size_t(row) * C;
"""
# y: the norm of x, its first half moved to the position after it
NORM_SHIFT = (
    _ROW
    + """
    float inv = 0;
    for (int c = lane; c < C; c += 32) { inv += x[start + c] * x[start + c]; }
    inv = metal::precise::rsqrt(simd_sum(inv) / C + EPS);
    for (int c = lane; c < C; c += 32) {
        const float value = x[start + c] * inv;
        if (c >= C / 2) {
            y[start + c] = value;
        } else {
            if (t + 1 < T) { y[start + C + c] = value; }
            if (t == 0) { y[start + c] = 0; }
        }
    }
"""
)
NORM_SHIFT_GRADIENT = (
    _ROW
    + """
    float inv = 0, dot = 0;
    for (int c = lane; c < C; c += 32) {
        const float d = c >= C / 2 ? dy[start + c] : t + 1 < T ? dy[start + C + c] : 0.0f;
        inv += x[start + c] * x[start + c];
        dot += x[start + c] * d;
    }
    inv = metal::precise::rsqrt(simd_sum(inv) / C + EPS);
    dot = simd_sum(dot) * inv * inv / C;
    for (int c = lane; c < C; c += 32) {
        const float d = c >= C / 2 ? dy[start + c] : t + 1 < T ? dy[start + C + c] : 0.0f;
        dx[start + c] = past[start + c] + inv * (d - x[start + c] * dot);
    }
"""
)

# Four lanes for one head of a token: a simdgroup reads eight heads, side by side in memory. A lane
# takes whole pairs of numbers; phases (T, D/2, 2) are cosine and sine of a pair's angle.
_HEAD = """
    const uint lane = thread_position_in_grid.x % 4, row = thread_position_in_grid.x / 4;
    const uint part = row % PARTS, token = row / PARTS, t = token % T, b = token / T;
"""
# The heads of queries and keys: PARTS is 2H.
NORM_ROTATE = (
    _HEAD
    + """
    const device float* x = qkv + (size_t(token) * 3 * H + part) * D;
    const device float* phase = phases + t * D;
    device float* to = qk + (size_t(b * 2 * H + part) * T + t) * D;
    float inv = 0;
    for (int c = 2 * lane; c < D; c += 8) { inv += x[c] * x[c] + x[c + 1] * x[c + 1]; }
    inv += simd_shuffle_xor(inv, ushort(1));
    inv += simd_shuffle_xor(inv, ushort(2));
    inv = metal::precise::rsqrt(inv / D + EPS);
    for (int c = 2 * lane; c < D; c += 8) {
        const float real = x[c] * inv, imaginary = x[c + 1] * inv;
        to[c] = real * phase[c] - imaginary * phase[c + 1];
        to[c + 1] = real * phase[c + 1] + imaginary * phase[c];
    }
"""
)
# The heads of queries, keys and values: PARTS is 3H.
NORM_ROTATE_GRADIENT = (
    _HEAD
    + """
    const bool is_value = part >= 2 * H;
    const uint head = is_value ? b * H + part - 2 * H : b * 2 * H + part;
    const device float* g = (is_value ? dv : dqk) + (size_t(head) * T + t) * D;
    const device float* x = qkv + size_t(row) * D;
    const device float* phase = phases + t * D;
    device float* to = dqkv + size_t(row) * D;
    float inv = 0, dot = 0;
    for (int c = 2 * lane; c < D; c += 8) {
        inv += x[c] * x[c] + x[c + 1] * x[c + 1];
        dot += x[c] * (g[c] * phase[c] + g[c + 1] * phase[c + 1]);
        dot += x[c + 1] * (g[c + 1] * phase[c] - g[c] * phase[c + 1]);
    }
    inv += simd_shuffle_xor(inv, ushort(1));
    inv += simd_shuffle_xor(inv, ushort(2));
    dot += simd_shuffle_xor(dot, ushort(1));
    dot += simd_shuffle_xor(dot, ushort(2));
    inv = metal::precise::rsqrt(inv / D + EPS);
    dot *= inv * inv / D;
    for (int c = 2 * lane; c < D; c += 8) {
        const float real = g[c] * phase[c] + g[c + 1] * phase[c + 1];
        const float imaginary = g[c + 1] * phase[c] - g[c] * phase[c + 1];
        to[c] = is_value ? g[c] : inv * (real - x[c] * dot);
        to[c + 1] = is_value ? g[c + 1] : inv * (imaginary - x[c + 1] * dot);
    }
"""
)
# δ = dy · y of each query, (B, H, T): PARTS is H.
DELTAS = (
    _HEAD
    + """
    const size_t start = size_t(row) * D;
    float delta = 0;
    for (int c = lane; c < D; c += 4) { delta += dy[start + c] * y[start + c]; }
    delta += simd_shuffle_xor(delta, ushort(1));
    delta += simd_shuffle_xor(delta, ushort(2));
    if (lane == 0) { deltas[(b * H + part) * T + t] = delta; }
"""
)

# One simdgroup for 8 queries (or keys) of a head. A product is of tiles of 8 × 8; a lane holds the
# numbers (i, j) and (i, j + 1) of each. Scores are never in memory.
_TILES = """
    const uint lane = thread_index_in_simdgroup, head = thread_position_in_grid.z;
    const uint b = head / H, h = head % H;
    const uint i = ((lane / 4) & 4) + (lane / 2) % 4, j = ((lane / 4) & 2) * 2 + (lane % 2) * 2;
    const device float* q = qk + (size_t(b) * 2 * H + h) * T * D;
    const device float* k = q + size_t(H) * T * D;
    const device float* v = qkv + (size_t(b) * T * 3 + 2) * H * D + h * D;
    const size_t first = size_t(b) * T * H * D + h * D;  // of this head in y (B, T, C)
    const float scale = metal::precise::rsqrt(float(D));
    const simdgroup_float8x8 zero = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    const ulong2 origin = ulong2(0, 0);
"""
# y (B, T, C), and the logarithm of the sum of the exponentials of each query's scores, (B, H, T).
# NORMED queries and keys have scores of at most √D, whose exponentials need no maximum. Of others
# the maximum so far is subtracted; what was summed before it grew is scaled down.
ATTEND = (
    _TILES
    + """
    const uint block = thread_position_in_grid.y;
    simdgroup_float8x8 query[D / 8], sum_pv[D / 8], p, tile;
    for (int d = 0; d < D / 8; d++) {
        simdgroup_load(query[d], q + block * 8 * D + d * 8, D);
        sum_pv[d] = zero;
    }
    float sum = 0, most = NORMED ? 0.0f : -INFINITY;
    for (uint n = 0; n <= block; n++) {
        p = zero;
        for (int d = 0; d < D / 8; d++) {
            simdgroup_load(tile, k + n * 8 * D + d * 8, D, origin, true);
            simdgroup_multiply_accumulate(p, query[d], tile, p);
        }
        for (uint e = 0; e < 2; e++) {
            p.thread_elements()[e] *= scale;
            if (n == block && j + e > i) { p.thread_elements()[e] = -INFINITY; }
        }
        if (!NORMED) {
            float now = metal::max(p.thread_elements()[0], p.thread_elements()[1]);
            now = metal::max(now, simd_shuffle_xor(now, ushort(1)));
            now = metal::max(most, metal::max(now, simd_shuffle_xor(now, ushort(8))));
            const float factor = metal::exp(most - now);
            for (int d = 0; d < D / 8; d++) {
                for (uint e = 0; e < 2; e++) { sum_pv[d].thread_elements()[e] *= factor; }
            }
            sum *= factor;
            most = now;
        }
        for (uint e = 0; e < 2; e++) {
            p.thread_elements()[e] = metal::exp(p.thread_elements()[e] - most);
            sum += p.thread_elements()[e];
        }
        for (int d = 0; d < D / 8; d++) {
            simdgroup_load(tile, v + n * 8 * 3 * H * D + d * 8, 3 * H * D);
            simdgroup_multiply_accumulate(sum_pv[d], p, tile, sum_pv[d]);
        }
    }
    sum += simd_shuffle_xor(sum, ushort(1));
    sum += simd_shuffle_xor(sum, ushort(8));
    for (int d = 0; d < D / 8; d++) {
        for (uint e = 0; e < 2; e++) { sum_pv[d].thread_elements()[e] /= sum; }
        simdgroup_store(sum_pv[d], y + first + block * 8 * H * D + d * 8, H * D);
    }
    if (j == 0) { log_sums[head * T + block * 8 + i] = most + metal::log(sum); }
"""
)
# dqk (B, 2H, T, D) and dv (B, H, T, D). Even simdgroups take 8 queries each and go through the keys
# up to theirs: dq = ds k. Odd ones take 8 keys and go through the queries from theirs on, and rows
# of their tiles are keys, columns queries: dk = ds q, dv = p dy.
ATTEND_GRADIENT = (
    _TILES
    + """
    const uint block = thread_position_in_grid.y / 2;
    const bool by_key = thread_position_in_grid.y % 2;
    const device float* near_s = by_key ? k : q;
    const device float* far_s = by_key ? q : k;
    const device float* near_p = by_key ? v : dy + first;
    const device float* far_p = by_key ? dy + first : v;
    const int near_width = by_key ? 3 * H * D : H * D, far_width = by_key ? H * D : 3 * H * D;
    simdgroup_float8x8 own_s[D / 8], own_p[D / 8], sum_s[D / 8], sum_p[D / 8], p, ds, tile;
    for (int d = 0; d < D / 8; d++) {
        simdgroup_load(own_s[d], near_s + block * 8 * D + d * 8, D);
        simdgroup_load(own_p[d], near_p + block * 8 * near_width + d * 8, near_width);
        sum_s[d] = zero;
        sum_p[d] = zero;
    }
    for (uint n = by_key ? block : 0; n < (by_key ? T / 8 : block + 1); n++) {
        p = zero;
        ds = zero;
        for (int d = 0; d < D / 8; d++) {
            simdgroup_load(tile, far_s + n * 8 * D + d * 8, D, origin, true);
            simdgroup_multiply_accumulate(p, own_s[d], tile, p);
            simdgroup_load(tile, far_p + n * 8 * far_width + d * 8, far_width, origin, true);
            simdgroup_multiply_accumulate(ds, own_p[d], tile, ds);
        }
        for (uint e = 0; e < 2; e++) {
            const uint row = block * 8 + i, column = n * 8 + j + e;
            const uint query = by_key ? column : row, key = by_key ? row : column;
            const float s = p.thread_elements()[e] * scale - log_sums[head * T + query];
            const float chance = key > query ? 0.0f : metal::exp(s), dp = ds.thread_elements()[e];
            p.thread_elements()[e] = chance;
            ds.thread_elements()[e] = chance * (dp - deltas[head * T + query]) * scale;
        }
        for (int d = 0; d < D / 8; d++) {
            simdgroup_load(tile, far_s + n * 8 * D + d * 8, D);
            simdgroup_multiply_accumulate(sum_s[d], ds, tile, sum_s[d]);
            if (by_key) {
                simdgroup_load(tile, far_p + n * 8 * far_width + d * 8, far_width);
                simdgroup_multiply_accumulate(sum_p[d], p, tile, sum_p[d]);
            }
        }
    }
    const size_t to = (size_t(b) * 2 * H + (by_key ? H + h : h)) * T * D + block * 8 * D;
    for (int d = 0; d < D / 8; d++) {
        simdgroup_store(sum_s[d], dqk + to + d * 8, D);
        if (by_key) { simdgroup_store(sum_p[d], dv + (head * T + block * 8) * D + d * 8, D); }
    }
"""
)


@dataclass(frozen=True)
class Kernel:
    """A kernel by name: its inputs and outputs, and the body in Metal."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str

    def __call__(
        self,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        shapes: Sequence[tuple[int, ...]],
        **sizes: int,
    ) -> list[mx.array]:
        """Return the outputs, float32 of these shapes, of a grid of lanes."""
        outputs: list[mx.array] = build(self)(
            inputs=list(inputs),
            template=list(sizes.items()),
            grid=grid,
            threadgroup=(LANES, GROUP, 1) if grid[0] == LANES else (LANES * GROUP, 1, 1),
            output_shapes=shapes,
            output_dtypes=[mx.float32] * len(shapes),
        )
        return outputs


@lru_cache
def build(kernel: Kernel) -> Any:
    """Return what launches a kernel; MLX compiles it when it first runs with a set of sizes."""
    return mx.fast.metal_kernel(
        name=f"mlxgpt_{kernel.name}",
        input_names=kernel.inputs,
        output_names=kernel.outputs,
        source=kernel.body,
        header=HEADER,
    )


_norm_shift = Kernel("norm_shift", ("x",), ("y",), NORM_SHIFT)
_norm_shift_gradient = Kernel(
    "norm_shift_gradient", ("x", "dy", "past"), ("dx",), NORM_SHIFT_GRADIENT
)
_norm_rotate = Kernel("norm_rotate", ("qkv", "phases"), ("qk",), NORM_ROTATE)
_norm_rotate_gradient = Kernel(
    "norm_rotate_gradient", ("qkv", "phases", "dqk", "dv"), ("dqkv",), NORM_ROTATE_GRADIENT
)
_attend = Kernel("attend", ("qk", "qkv"), ("y", "log_sums"), ATTEND)
_deltas = Kernel("deltas", ("y", "dy"), ("deltas",), DELTAS)
_attend_gradient = Kernel(
    "attend_gradient", ("qk", "qkv", "dy", "log_sums", "deltas"), ("dqk", "dv"), ATTEND_GRADIENT
)
KERNELS = (
    _norm_shift, _norm_shift_gradient, _norm_rotate, _norm_rotate_gradient,
    _attend, _deltas, _attend_gradient,
)  # fmt: skip


def norm_shift(x: mx.array) -> mx.array:
    """Return the norm of x (B, T, C), its first half of channels from the position before."""
    b, t, c = x.shape
    return _norm_shift([x], (LANES, b * t, 1), [x.shape], T=t, C=c)[0]


def norm_shift_gradient(x: mx.array, dy: mx.array, past: mx.array) -> mx.array:
    """Return dx (B, T, C) for dy, plus the gradient that came past the branch."""
    b, t, c = x.shape
    return _norm_shift_gradient([x, dy, past], (LANES, b * t, 1), [x.shape], T=t, C=c)[0]


def norm_rotate(qkv: mx.array, n_head: int, rope_base: float) -> mx.array:
    """Return queries and keys of qkv (B, T, 3C), normed and rotated, (B, 2H, T, D)."""
    b, t, width = qkv.shape
    h, d, parts = n_head, width // (3 * n_head), 2 * n_head
    grid, shape = (LANES_A_HEAD * b * t * parts, 1, 1), (b, parts, t, d)
    inputs = [qkv, phases(t, d, rope_base)]
    return _norm_rotate(inputs, grid, [shape], T=t, H=h, D=d, PARTS=parts)[0]


def norm_rotate_gradient(qkv: mx.array, dqk: mx.array, dv: mx.array, rope_base: float) -> mx.array:
    """Return dqkv (B, T, 3C) for dqk (B, 2H, T, D) and dv (B, H, T, D)."""
    (b, h, t, d), parts = dv.shape, 3 * dv.shape[1]
    grid, inputs = (LANES_A_HEAD * b * t * parts, 1, 1), [qkv, phases(t, d, rope_base), dqk, dv]
    return _norm_rotate_gradient(inputs, grid, [qkv.shape], T=t, H=h, D=d, PARTS=parts)[0]


def attend(qk: mx.array, qkv: mx.array, qk_norm: bool) -> list[mx.array]:
    """Return the mixed values (B, T, C), and what the gradient needs besides, (B, H, T).

    Queries and keys are qk (B, 2H, T, D), with `qk_norm` normed ones; values are the last third of
    qkv (B, T, 3C).
    """
    b, parts, t, d = qk.shape
    h = parts // 2
    grid, shapes = (LANES, t // TILE, b * h), [(b, t, h * d), (b, h, t)]
    return _attend([qk, qkv], grid, shapes, T=t, H=h, D=d, NORMED=int(qk_norm))


def attend_gradient(
    qk: mx.array, qkv: mx.array, y: mx.array, log_sums: mx.array, dy: mx.array
) -> list[mx.array]:
    """Return dqk (B, 2H, T, D) and dv (B, H, T, D) for dy (B, T, C)."""
    (b, h, t), d = log_sums.shape, qk.shape[-1]
    by_head = (LANES_A_HEAD * b * t * h, 1, 1)
    deltas = _deltas([y, dy], by_head, [(b, h, t)], T=t, H=h, D=d, PARTS=h)[0]
    grid, shapes = (LANES, 2 * t // TILE, b * h), [qk.shape, (b, h, t, d)]
    return _attend_gradient([qk, qkv, dy, log_sums, deltas], grid, shapes, T=t, H=h, D=d)


@lru_cache(maxsize=8)
def phases(t: int, d: int, base: float) -> mx.array:
    """Return cosine and sine of the angle of each pair of a head at each position, (T, D/2, 2)."""
    angles = np.arange(t)[:, None] * rope_rates(d, base)  # (T, D/2), float64
    return mx.array(np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32))
