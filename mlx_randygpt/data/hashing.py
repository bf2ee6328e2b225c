"""Hashes of numbers, and of all windows of a text at once, to find what occurs in two places."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def hash_numbers(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Map each x to a pseudorandom 64-bit number (splitmix64, Steele et al. 2014)."""
    x = x * GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# odd; multiples of one number would give windows such as (0, 1, 0, 0) and (0, 0, 3, 0) one hash
FACTORS = hash_numbers(np.arange(1, 34, dtype=np.uint64)) | np.uint64(1)


def hash_windows(codes: NDArray[Any], length: int) -> NDArray[Any]:
    """Return a hash of each window of `length` numbers, (n - length + 1,), of the type of `codes`.

    The type is uint32 or uint64; its high bits are the better ones. A window of 2n numbers is
    hashed from its halves, one of any other length from two windows that overlap.
    """
    factors = np.array(FACTORS, np.uint64)
    if codes.dtype == np.uint32:
        factors = factors >> np.uint64(32) | np.uint64(1)
    h, n, level = codes, 1, 0
    while n < length:
        shift = min(n, length - n)
        h = h[:-shift] * factors[level].astype(codes.dtype) + h[shift:]
        n, level = n + shift, level + 1
    hashes: NDArray[Any] = h * factors[-1].astype(codes.dtype)
    return hashes
