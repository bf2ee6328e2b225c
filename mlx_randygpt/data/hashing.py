"""Hashes of all windows of a text at once, to find what occurs in two places."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FACTORS = [0x9E3779B97F4A7C15 * odd & 0xFFFFFFFFFFFFFFFF for odd in range(1, 67, 2)]  # all odd


def hash_windows(codes: NDArray[Any], length: int) -> NDArray[Any]:
    """Return a hash of each window of `length` numbers, (n - length + 1,), of the type of `codes`.

    The type is uint32 or uint64; its high bits are the better ones. A window of 2n numbers is
    hashed from its halves, one of any other length from two windows that overlap.
    """
    factors = np.array(FACTORS, np.uint64)
    if codes.dtype == np.uint32:
        factors >>= np.uint64(32)
        factors |= np.uint64(1)
    h, n, level = codes, 1, 0
    while n < length:
        shift = min(n, length - n)
        h = h[:-shift] * factors[level].astype(codes.dtype) + h[shift:]
        n, level = n + shift, level + 1
    hashes: NDArray[Any] = h * factors[-1].astype(codes.dtype)
    return hashes
