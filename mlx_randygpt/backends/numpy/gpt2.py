"""GPT-2 in NumPy: what its blocks do otherwise than ours, training and decoding.

LayerNorm with gain and bias, GELU, a bias in every product, and a head that is wte (Radford et al.
2019). Dropout stands where ours does, after the attention and after the MLP.

Legend: B sequences, T time, C n_embd, F = 4C, N = B·T.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from mlx_randygpt.backends.numpy import decode
from mlx_randygpt.backends.numpy.model import BranchInput, Chunk
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import GPT2_NORM_EPS
from mlx_randygpt.state import Array, Params

TANH_SCALE, TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715
NODES, REACH = 1 << 14, 8.0  # of the table of the normal distribution, which spans ±REACH


def layer_norm(x: Array, hat: Array, inv: Array) -> None:
    """x̂ = (x − mean(x)) · inv, inv = (var(x) + eps)^-½ over the last axis; (N, C) and (N,)
    (Ba et al. 2016, arXiv:1607.06450). The variance is that of all C values."""
    np.subtract(x, x.mean(axis=-1, keepdims=True), out=hat)
    np.vecdot(hat, hat, out=inv)
    inv /= x.shape[-1]
    inv += GPT2_NORM_EPS
    np.sqrt(inv, out=inv)
    np.reciprocal(inv, out=inv)
    hat *= inv[:, None]


def layer_norm_backward(dhat: Array, hat: Array, inv: Array, scratch: Array) -> None:
    """dx = inv · (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)), written over dx̂ (N, C)."""
    along = np.vecdot(dhat, hat) / hat.shape[-1]
    dhat -= dhat.mean(axis=-1, keepdims=True)
    np.multiply(hat, along[:, None], out=scratch)
    dhat -= scratch
    dhat *= inv[:, None]


def gelu_tanh(h: Array, out: Array) -> None:
    """a = ½h(1 + tanh(√(2/π)(h + 0.044715h³))) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
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
    """dh = da · (½(1 + t) + ½h(1 − t²)·√(2/π)(1 + 3·0.044715h²)), written over da."""
    square = h * h
    t = np.tanh(TANH_SCALE * h * (1 + TANH_CUBIC * square))
    da *= 0.5 * (1 + t) * (1 + (1 - t) * h * TANH_SCALE * (1 + 3 * TANH_CUBIC * square))


def gelu(h: Array, out: Array) -> None:
    """a = h · Φ(h), Φ the normal distribution: the exact one."""
    np.multiply(h, normal_cdf(h), out=out)


def gelu_backward(da: Array, h: Array) -> None:
    """dh = da · (Φ(h) + h·φ(h)), φ the normal density, written over da."""
    da *= normal_cdf(h) + h * np.exp(-0.5 * h * h) * (1 / math.sqrt(2 * math.pi))


def normal_cdf(x: Array) -> Array:
    """Φ(x) to 1e-14 in float64: a cubic between nodes of a table, through values and slopes; NumPy
    has no erf."""
    table = _table(x.dtype)
    at = np.clip((x + REACH) * (NODES / (2 * REACH)), 0, NODES - 1e-3)
    cell = at.astype(np.int32)
    t = at - cell  # in [0, 1)
    c0, c1, c2, c3 = (row.take(cell) for row in table)
    return np.asarray(c0 + t * (c1 + t * (c2 + t * c3)))


@lru_cache(maxsize=4)
def _table(dtype: np.dtype[Any]) -> Array:
    """Coefficients of each cell's cubic, (4, NODES)."""
    x = np.linspace(-REACH, REACH, NODES + 1)
    value = np.array([0.5 * math.erfc(-node / math.sqrt(2)) for node in x])
    slope = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) * (2 * REACH / NODES)
    rise, m0, m1 = np.diff(value), slope[:-1], slope[1:]
    return np.array([value[:-1], m0, 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise]).astype(dtype)


class GPT2Chunk(Chunk):
    """A chunk whose norms and products have weights of their own."""

    head_name = "wte.weight"

    def _activate(self, h: Array, out: Array, again: bool = False) -> None:
        (gelu if self.config.activation == "gelu" else gelu_tanh)(h, out)

    def _activate_backward(self, da: Array, r: Array) -> None:
        (gelu_backward if self.config.activation == "gelu" else gelu_tanh_backward)(da, r)

    def _read(self, w: Params, name: str, x: Array, read: BranchInput, t: int | None) -> Array:
        hat, inv, out = read.first(len(x))
        layer_norm(x, hat, inv)
        np.multiply(hat, w[f"{name}.weight"], out=out)
        if self.config.bias:
            out += w[f"{name}.bias"]
        return out

    def _read_backward(
        self, w: Params, name: str, dx: Array, read: BranchInput, t: int | None
    ) -> Array:
        hat, inv, _ = read.first(len(dx))
        scratch = self.scratch[: len(dx)]
        self._vector_grad(f"{name}.weight", np.multiply(dx, hat, out=scratch))
        if self.config.bias:
            self._vector_grad(f"{name}.bias", dx)
        dx *= w[f"{name}.weight"]
        layer_norm_backward(dx, hat, inv, scratch)
        return dx

    def _product(self, w: Params, name: str, inputs: Array, out: Array) -> Array:
        super()._product(w, name, inputs, out)
        if self.config.bias:
            out += w[f"{name}.bias"]
        return out

    def _product_backward(
        self, w: Params, name: str, dout: Array, inputs: Array, out: Array
    ) -> Array:
        if self.config.bias:
            self._vector_grad(f"{name}.bias", dout)
        return super()._product_backward(w, name, dout, inputs, out)

    def _vector_grad(self, name: str, dout: Array) -> None:
        """dv += Σ over positions of dout (N, size); the first chunk of a step overwrites."""
        gradient = self.grads[name]
        if self.accumulating:
            gradient += dout.sum(axis=0)
        else:
            np.sum(dout, axis=0, out=gradient)


def advance(
    w: Params, config: ModelConfig, tokens: Array, cache: decode.NumpyCache, rows: slice
) -> Array:
    """`numpy_cache.advance` of this architecture: append tokens (B, T) to the rows; what the head
    reads of the last position, (B, C)."""
    where = decode.place(cache, rows, tokens.shape[1])
    activate = gelu if config.activation == "gelu" else gelu_tanh
    x = w["wte.weight"][tokens] + w["wpe.weight"][where.positions]  # (B, T, C)
    for i in range(config.n_layer):
        qkv = _product(w, f"h.{i}.attn.c_attn", _norm(w, f"h.{i}.ln_1", x))
        y = decode.attend(qkv, config, i, cache, where)  # (B, T, C)
        x = x + _product(w, f"h.{i}.attn.c_proj", y)
        h = _product(w, f"h.{i}.mlp.c_fc", _norm(w, f"h.{i}.ln_2", x))  # (B, T, F)
        a = np.empty_like(h)
        activate(h, a)
        x = x + _product(w, f"h.{i}.mlp.c_proj", a)
    cache.lengths[rows] += tokens.shape[1]
    return _norm(w, "ln_f", x[:, -1])


def _norm(w: Params, name: str, x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    hat, inv = np.empty_like(rows), np.empty(len(rows), x.dtype)
    layer_norm(rows, hat, inv)
    return np.asarray((hat * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)).reshape(x.shape))


def _product(w: Params, name: str, x: Array) -> Array:
    return np.asarray(decode.product(x, w[f"{name}.weight"]) + w.get(f"{name}.bias", 0))
