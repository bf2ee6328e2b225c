"""The operations that only GPT-2 has: LayerNorm and GELU, each as a forward/backward pair.

`ops` has the others, and the same conventions. GPT-2 (Radford et al. 2019) also has gains, biases
and a tied head, which `model` and `decode` handle.

Legend: C n_embd, F = 4C, N positions.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from mlx_randygpt.model import GPT2_NORM_EPS
from mlx_randygpt.state import Array

TANH_SCALE, TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715
NODES, REACH = 1 << 14, 8.0  # the table of the normal distribution has NODES cells over ±REACH


def layer_norm(x: Array, hat: Array, inv: Array) -> None:
    """Normalise: x̂ = (x − mean(x)) · inv, inv = (var(x) + eps)^-½; (N, C) and (N,).

    Over the last axis; the variance divides by C (Ba et al. 2016, arXiv:1607.06450).
    """
    np.subtract(x, x.mean(axis=-1, keepdims=True), out=hat)
    np.vecdot(hat, hat, out=inv)
    inv /= x.shape[-1]
    inv += GPT2_NORM_EPS
    np.sqrt(inv, out=inv)
    np.reciprocal(inv, out=inv)
    hat *= inv[:, None]


def layer_norm_backward(dhat: Array, hat: Array, inv: Array, scratch: Array) -> None:
    """Compute dx = inv · (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)), over dx̂ (N, C)."""
    mean_dot = np.vecdot(dhat, hat) / hat.shape[-1]
    dhat -= dhat.mean(axis=-1, keepdims=True)
    np.multiply(hat, mean_dot[:, None], out=scratch)
    dhat -= scratch
    dhat *= inv[:, None]


def gelu_tanh(h: Array, out: Array) -> None:
    """Compute a = ½h(1 + tanh(√(2/π)(h + 0.044715h³))).

    The approximation of Hendrycks & Gimpel (2016, arXiv:1606.08415).
    """
    np.multiply(h, h, out=out)
    out *= TANH_CUBIC
    out += 1
    out *= h
    out *= TANH_SCALE
    np.tanh(out, out=out)
    out += 1
    out *= h
    out *= 0.5


def gelu_tanh_backward(da: Array, h: Array) -> None:
    """Compute dh = da · (½(1 + t) + ½h(1 − t²)·√(2/π)(1 + 3·0.044715h²)), over da."""
    square = h * h
    t = np.tanh(TANH_SCALE * h * (1 + TANH_CUBIC * square))
    da *= 0.5 * (1 + t) * (1 + (1 - t) * h * TANH_SCALE * (1 + 3 * TANH_CUBIC * square))


def gelu(h: Array, out: Array) -> None:
    """Compute the exact GELU, a = h · Φ(h) with the normal distribution Φ."""
    np.multiply(h, normal_cdf(h), out=out)


def gelu_backward(da: Array, h: Array) -> None:
    """Compute dh = da · (Φ(h) + h·φ(h)) with the normal density φ, over da."""
    da *= normal_cdf(h) + h * np.exp(-0.5 * h * h) * (1 / math.sqrt(2 * math.pi))


def normal_cdf(x: Array) -> Array:
    """Return Φ(x), to 1e-14 in float64.

    NumPy has no erf, so a table holds a cubic for each cell, through values and slopes.
    """
    table = _table(x.dtype)
    position = np.clip((x + REACH) * (NODES / (2 * REACH)), 0, NODES - 1e-3)
    cell = position.astype(np.int32)
    t = position - cell  # in [0, 1)
    c0, c1, c2, c3 = (row.take(cell) for row in table)
    return np.asarray(c0 + t * (c1 + t * (c2 + t * c3)))


@lru_cache(maxsize=4)
def _table(dtype: np.dtype[Any]) -> Array:
    """Return the coefficients of each cell's cubic, (4, NODES)."""
    x = np.linspace(-REACH, REACH, NODES + 1)
    value = np.array([0.5 * math.erfc(-node / math.sqrt(2)) for node in x])
    slope = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) * (2 * REACH / NODES)
    rise, m0, m1 = np.diff(value), slope[:-1], slope[1:]
    return np.array([value[:-1], m0, 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise]).astype(dtype)
