"""How fast this device multiplies matrices with MLX."""

from __future__ import annotations

import time

import mlx.core as mx

N_TRIES = 5


def matmul_flops(on_gpu: bool) -> float:
    """Floating-point operations per second of chains of square products, the best of five; TF32
    counts where MLX uses it."""
    size, n = (4096, 8) if on_gpu else (512, 1)
    x, best = mx.ones((size, size)) / size, 0.0
    mx.eval(x)
    for _ in range(N_TRIES):
        start, y = time.perf_counter(), x
        for _ in range(n):
            y = y @ x
        mx.eval(y)
        best = max(best, 2 * size**3 * n / (time.perf_counter() - start))
    return best
