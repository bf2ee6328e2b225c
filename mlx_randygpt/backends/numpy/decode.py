"""Decoding in NumPy: a KV cache and the forward pass of the newest tokens.

Each row of the cache is a ring of `block_size` slots: position p lies in slot p % block_size.
Turned keys carry their position with them, so the order of the slots does not matter and dropping
the oldest key is writing over it.

Legend: B streams, T new tokens, C n_embd, H heads, D = C/H, S slots that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise

import numpy as np

from mlx_randygpt.backends.base import check_decoding
from mlx_randygpt.backends.numpy import ops
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import Array, Params

Advance = Callable[[Params, ModelConfig, Array, "NumpyCache", slice], Array]
ROWS_PER_THREAD = 8  # streams that pay for a second thread; of a prompt, 8 tokens count as one
COMPILED_FROM = 2000  # tokens; by then waiting for numba to load would have paid for itself


class NumpyCache:
    """Keys and values, (L, B, H, D, block_size) each; with token shift also the half of
    the last position that attention and MLP of each layer read next, (L, 2, B, C/2)."""

    def __init__(self, config: ModelConfig, batch_size: int, dtype: type) -> None:
        shape = (config.n_layer, batch_size, config.n_head, config.head_size, config.block_size)
        self.k: Array = np.zeros(shape, dtype)
        self.v: Array = np.zeros(shape, dtype)
        self.last: Array = np.zeros((config.n_layer, 2, batch_size, config.n_embd // 2), dtype)
        self.lengths: Array = np.zeros(batch_size, np.int64)

    def reset(self, rows: slice) -> None:
        """Empty these rows; keys past a row's length are never read."""
        self.lengths[rows] = 0
        self.last[:, :, rows] = 0

    def move(self, source: int, target: int) -> None:
        for array in (self.k, self.v):
            array[:, target] = array[:, source]
        self.last[:, :, target] = self.last[:, :, source]
        self.lengths[target] = self.lengths[source]

    def select(self, rows: Sequence[int]) -> None:
        self.k, self.v = (np.take(array, rows, axis=1) for array in (self.k, self.v))
        self.last, self.lengths = np.take(self.last, rows, axis=2), self.lengths[list(rows)]


@dataclass(frozen=True)
class WriteSlots:
    """Where T new tokens of each of some rows go, and which slots their queries read."""

    rows: slice
    positions: Array  # (B, T), or (1, T) where the rows are of one length
    slots: Array  # (B,) or (1,), of the first of them
    n_read: int  # S, of the fullest row
    hidden: Array | None  # (B, 1, S, 1), -inf where a row has no key; None where all are full


def place(cache: NumpyCache, rows: slice, t: int) -> WriteSlots:
    """The next T positions of these rows."""
    lengths, size = cache.lengths[rows], cache.k.shape[-1]
    if (lengths == lengths[0]).all():
        lengths = lengths[:1]
    filled = np.minimum(lengths + t, size)
    n_read, hidden = int(filled.max()), None
    if filled.min() < n_read:
        empty = np.arange(n_read) >= filled[:, None]  # (B, S)
        hidden = np.where(empty, -np.inf, 0).astype(cache.k.dtype)[:, None, :, None]
    return WriteSlots(rows, lengths[:, None] + np.arange(t), lengths % size, n_read, hidden)


class Decoder:
    """`Backend.logits` over weights that are changed in place: flat, and as views of it."""

    def __init__(
        self, config: ModelConfig, advance: Advance, flat: Array, params: Params,
        pool: Executor, n_threads: int,
    ) -> None:  # fmt: skip
        self.config, self._advance, self.flat, self.params = config, advance, flat, params
        self.pool, self.n_threads = pool, n_threads
        self.n_decoded = 0

    def logits(self, tokens: Array, cache: NumpyCache, rows: slice) -> Array:
        """As promised in base; many rows are shared out among the threads."""
        check_decoding(self.config, tokens, cache.lengths[rows])
        self.n_decoded += tokens.size
        n, start = len(tokens), rows.start or 0
        n_parts = max(1, min(self.n_threads, n, max(n, tokens.size // 8) // ROWS_PER_THREAD))
        if n_parts == 1:
            return self._logits(tokens, cache, slice(start, start + n))
        edges = [n * i // n_parts for i in range(n_parts + 1)]
        parts = [
            self.pool.submit(self._logits, tokens[a:b], cache, slice(start + a, start + b))
            for a, b in pairwise(edges)
        ]
        return np.concatenate([part.result() for part in parts])

    def _logits(self, tokens: Array, cache: NumpyCache, rows: slice) -> Array:
        """Empty rows take up to block_size tokens at once, others take them one by one."""
        if tokens.shape[1] > 1 and not cache.lengths[rows].any():
            return self._head(self._advance(self.params, self.config, tokens, cache, rows))
        ours = self.config.arch == "gpt"
        if ours and self.n_decoded > COMPILED_FROM and has_numba():
            from mlx_randygpt.backends.numpy import decode_numba

            return decode_numba.logits(self.config, self.flat, tokens, cache, rows)
        for column in tokens.T:
            x = self._advance(self.params, self.config, column[:, None], cache, rows)
        return self._head(x)

    def _head(self, x: Array) -> Array:
        """Logits (B, V) of what the head reads (B, C)."""
        head = self.params.get("lm_head.weight", self.params["wte.weight"])
        return (x @ head.T).astype(np.float32, copy=False)


@lru_cache(maxsize=1)
def has_numba() -> bool:
    """Whether numba_decode can be compiled: numba is there, and for this NumPy."""
    try:
        import_module("mlx_randygpt.backends.numpy.decode_numba")
    except ImportError:
        return False
    return True


def advance(w: Params, config: ModelConfig, tokens: Array, cache: NumpyCache, rows: slice) -> Array:
    """Append tokens (B, T) to the rows; what the head reads of the last position, (B, C)."""
    b, t = tokens.shape
    where = place(cache, rows, t)
    x = w["wte.weight"][tokens]  # (B, T, C)
    if config.position == "learned":
        x = x + w["wpe.weight"][where.positions]
    copies = 2 * config.n_head
    phases = ops.rope_phases(where.positions, config.head_size, copies, x.dtype.type)
    for i in range(config.n_layer):
        inputs = _shift(config, _norm(x), cache.last[i, 0, rows])
        qkv = product(inputs, w[f"h.{i}.attn.c_attn.weight"])  # (B, T, 3C)
        qk = qkv[:, :, : 2 * config.n_embd]
        if config.qk_norm:
            per_head = qk.reshape(b, t, copies, config.head_size)
            per_head[...] = _norm(per_head)
        if config.position == "rope":
            ops.rotate(qk, phases)
        y = attend(qkv, config, i, cache, where)  # (B, T, C)
        x = x + product(y, w[f"h.{i}.attn.c_proj.weight"])
        inputs = _shift(config, _norm(x), cache.last[i, 1, rows])
        h = np.maximum(product(inputs, w[f"h.{i}.mlp.c_fc.weight"]), 0)  # (B, T, F)
        x = x + product(h * h, w[f"h.{i}.mlp.c_proj.weight"])
    cache.lengths[rows] += t
    return _norm(x[:, -1]) if config.final_norm else x[:, -1]


def _shift(config: ModelConfig, norm: Array, last: Array) -> Array:
    """norm (B, T, C), its first half from the position before; `last` (B, C/2) is the latest."""
    if not config.token_shift:
        return norm
    half = last.shape[-1]
    before = np.concatenate([last[:, None], norm[:, :-1, :half]], axis=1)
    last[...] = norm[:, -1, :half]
    return np.concatenate([before, norm[:, :, half:]], axis=-1)


def attend(
    qkv: Array, config: ModelConfig, layer: int, cache: NumpyCache, where: WriteSlots
) -> Array:
    """Store keys and values of qkv (B, T, 3C) and let its queries attend; (B, T, C)."""
    b, t, _ = qkv.shape
    q, k, v = ops.heads(qkv, config.n_head, 3)  # (B, H, T, D)
    keys, values = cache.k[layer, where.rows], cache.v[layer, where.rows]  # (B, H, D, W)
    if len(where.slots) == 1:
        slots = slice(where.slots[0], where.slots[0] + t)
        keys[..., slots], values[..., slots] = k.swapaxes(-1, -2), v.swapaxes(-1, -2)
    else:
        each = np.arange(b)
        keys[each, :, :, where.slots], values[each, :, :, where.slots] = k[:, :, 0], v[:, :, 0]
    scores = q @ keys[..., : where.n_read]  # (B, H, T, S)
    scores *= config.head_size**-0.5
    scores = scores.swapaxes(-1, -2)  # (B, H, S, T)
    if t > 1:
        ops.causal_softmax(scores, 0, config.qk_norm)
    else:
        if where.hidden is not None:
            scores += where.hidden
        scores -= scores.max(axis=-2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-2, keepdims=True)
    y: Array = values[..., : where.n_read] @ scores  # (B, H, D, T)
    return y.transpose(0, 3, 1, 2).reshape(b, t, config.n_embd)


def product(x: Array, w: Array) -> Array:
    """x wᵀ as one product of two matrices: NumPy would make one of each sequence. (B, T, K) and
    (M, K) to (B, T, M)."""
    return np.asarray((x.reshape(-1, x.shape[-1]) @ w.T).reshape(*x.shape[:-1], len(w)))


def _norm(x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    out, inv = np.empty_like(rows), np.empty(len(rows), x.dtype)
    ops.rms_norm(rows, out, inv)
    return out.reshape(x.shape)
