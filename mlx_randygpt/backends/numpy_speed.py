"""How fast this machine multiplies matrices with NumPy, as the backend does."""

from __future__ import annotations

import time
from concurrent.futures import Executor

import numpy as np

from mlx_randygpt.state import Array

SIZE, N_PRODUCTS, N_TRIES = 768, 8, 5


def matmul_flops(pool: Executor, n_threads: int, dtype: type) -> float:
    """Floating-point operations per second: all threads multiply square matrices at once, the best
    of five tries."""
    best = 0.0
    x: Array = np.ones((SIZE, SIZE), dtype)
    out: list[Array] = [np.empty_like(x) for _ in range(n_threads)]

    def work(i: int) -> None:
        for _ in range(N_PRODUCTS):
            np.matmul(x, x, out=out[i])

    for _ in range(N_TRIES):
        start = time.perf_counter()
        list(pool.map(work, range(n_threads)))
        seconds = time.perf_counter() - start
        best = max(best, 2 * SIZE**3 * N_PRODUCTS * n_threads / seconds)
    return best
