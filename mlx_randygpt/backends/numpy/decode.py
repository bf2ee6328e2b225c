"""Decoding in NumPy: a KV cache and the forward pass of the newest tokens.

Each row of the cache is a ring of `block_size` slots: position p lies in slot p % block_size.
Rotated keys carry their position with them, so the order of the slots does not matter, and the
newest key overwrites the oldest.

Legend: B sequences, T new tokens, C n_embd, H heads, D = C/H, F = 4C, S slots that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_randygpt.backends.base import check_decoding
from mlx_randygpt.backends.numpy import gpt2, ops
from mlx_randygpt.backends.numpy.model import head_weight
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import Array, Params

ROWS_PER_THREAD = 8  # sequences worth a second thread; 8 tokens of a prompt count as one
COMPILED_FROM = 2000  # tokens; from there on the time to load numba pays for itself


class NumpyCache:
    """Keys and values, (L, B, H, D, block_size) each, and the length of each row.

    With token shift also the half of the last position that attention and MLP of each layer read
    next, (L, 2, B, C/2).
    """

    def __init__(self, config: ModelConfig, batch_size: int, dtype: type) -> None:
        shape = (config.n_layer, batch_size, config.n_head, config.head_size, config.block_size)
        self.k: Array = np.zeros(shape, dtype)
        self.v: Array = np.zeros(shape, dtype)
        self.last: Array = np.zeros((config.n_layer, 2, batch_size, config.n_embd // 2), dtype)
        self.lengths: Array = np.zeros(batch_size, np.int64)
        self.packed = False  # whether keys and values are as `decode_numba` reads them

    def reset(self, rows: slice) -> None:
        """Empty these rows; keys beyond a row's length are never read."""
        self.lengths[rows] = 0
        self.last[:, :, rows] = 0

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        for array in (self.k, self.v):
            array[:, target] = array[:, source]
        self.last[:, :, target] = self.last[:, :, source]
        self.lengths[target] = self.lengths[source]

    def select(self, rows: Sequence[int]) -> None:
        """Replace the rows of the cache by copies of these rows."""
        self.k, self.v = (np.take(array, rows, axis=1) for array in (self.k, self.v))
        self.last, self.lengths = np.take(self.last, rows, axis=2), self.lengths[list(rows)]


@dataclass(frozen=True)
class WriteSlots:
    """The slots that T new tokens of some rows write, and the slots that their queries read."""

    rows: slice
    positions: Array  # (B, T), or (1, T) if all rows have one length
    slots: Array  # (B,) or (1,), of the first new token
    n_read: int  # S, of the fullest row
    hidden: Array | None  # (B, 1, S, 1), -inf if a row has no key there; None if all rows are full


def next_slots(cache: NumpyCache, rows: slice, t: int) -> WriteSlots:
    """Return the slots of the next T positions of these rows."""
    lengths, size = cache.lengths[rows], cache.k.shape[-1]
    if (lengths == lengths[0]).all():
        lengths = lengths[:1]
    filled = np.minimum(lengths + t, size)
    n_read, hidden = int(filled.max()), None
    if filled.min() < n_read:
        empty = np.arange(n_read) >= filled[:, None]  # (B, S)
        hidden = np.where(empty, -np.inf, 0).astype(cache.k.dtype)[:, None, :, None]
    return WriteSlots(
        rows=rows,
        positions=lengths[:, None] + np.arange(t),
        slots=lengths % size,
        n_read=n_read,
        hidden=hidden,
    )


class Decoder:
    """`Backend.logits` over weights that are changed in place, and then announced."""

    def __init__(self, config: ModelConfig, params: Params, pool: Executor, n_threads: int) -> None:
        self.config, self.params = config, params
        self.pool, self.n_threads = pool, n_threads
        self.n_decoded = 0
        self._packed: Any = None

    def forget_weights(self) -> None:
        """Copy the weights again before they are read next: they have changed."""
        self._packed = None

    def logits(self, tokens: Array, cache: NumpyCache, rows: slice) -> Array:
        """Return logits as `Backend.logits` does; many rows are split over the threads."""
        check_decoding(self.config, tokens, cache.lengths[rows])
        self.n_decoded += tokens.size
        n, start = len(tokens), rows.start or 0
        n_parts = max(1, min(self.n_threads, n, max(n, tokens.size // 8) // ROWS_PER_THREAD))
        edges = [n * i // n_parts for i in range(n_parts + 1)]
        logits: Array = np.empty((n, self.config.vocab_size), np.float32)
        advance = self._advance_compiled(cache) if self.compiled else self._advance

        def work(first: int, last: int) -> None:
            part = slice(start + first, start + last)
            advance(tokens[first:last], cache, part, logits[first:last])

        others = [self.pool.submit(work, *edge) for edge in pairwise(edges[1:])]
        work(0, edges[1])  # this thread would only wait
        for other in others:
            other.result()
        return logits

    @property
    def compiled(self) -> bool:
        """Whether numba's function decodes now."""
        config, dtype = self.config, self.params["wte.weight"].dtype
        possible = not config.is_gpt2 and dtype == np.float32
        return possible and self.n_decoded > COMPILED_FROM and has_numba()

    def _advance_compiled(self, cache: NumpyCache) -> Callable[..., None]:
        """Return what `_advance` does as one compiled function."""
        from mlx_randygpt.backends.numpy import decode_numba

        if self._packed is None:
            self._packed = decode_numba.PackedWeights(self.config, self.params)
        if not cache.packed:
            cache.k, cache.v = decode_numba.pack_keys(cache.k), decode_numba.pack_values(cache.v)
            cache.packed = True
        advance: Callable[..., None] = self._packed.advance
        return advance

    def _advance(self, tokens: Array, cache: NumpyCache, rows: slice, logits: Array) -> None:
        """Append up to block_size tokens at once to empty rows, one at a time to others.

        The logits (B, V) of the last are written.
        """
        if tokens.shape[1] > 1 and not cache.lengths[rows].any():
            x = advance(self.params, self.config, tokens, cache, rows)
        else:
            for column in tokens.T:
                x = advance(self.params, self.config, column[:, None], cache, rows)
        logits[...] = x @ head_weight(self.params).T


@lru_cache(maxsize=1)
def has_numba() -> bool:
    """Return whether numba is installed and supports this NumPy."""
    try:
        import_module("mlx_randygpt.backends.numpy.decode_numba")
    except ImportError:
        return False
    return True


def advance(w: Params, config: ModelConfig, tokens: Array, cache: NumpyCache, rows: slice) -> Array:
    """Append tokens (B, T) to the rows; return the input of the head at the last position, (B, C).

    Both architectures run here.
    """
    b, t = tokens.shape
    target = next_slots(cache, rows, t)
    x = w["wte.weight"][tokens]  # (B, T, C)
    if config.position == "learned":
        x = x + w["wpe.weight"][target.positions]
    n_rotated = 2 * config.n_head  # queries and keys
    if config.position == "rope":
        phases = ops.rope_phases(target.positions, config.head_size, n_rotated, x.dtype.type)
    for i in range(config.n_layer):
        inputs = _shift(config, _norm(w, f"h.{i}.ln_1", config, x), cache.last[i, 0, rows])
        qkv = _linear(w, f"h.{i}.attn.c_attn", config, inputs)  # (B, T, 3C)
        qk = qkv[:, :, : 2 * config.n_embd]
        if config.qk_norm:
            per_head = qk.reshape(b, t, n_rotated, config.head_size)
            per_head[...] = _rms_norm(per_head)
        if config.position == "rope":
            ops.rotate(qk, phases)
        y = attend(qkv, config, i, cache, target)  # (B, T, C)
        x = x + _linear(w, f"h.{i}.attn.c_proj", config, y)
        inputs = _shift(config, _norm(w, f"h.{i}.ln_2", config, x), cache.last[i, 1, rows])
        a = _activate(config, _linear(w, f"h.{i}.mlp.c_fc", config, inputs))  # (B, T, F)
        x = x + _linear(w, f"h.{i}.mlp.c_proj", config, a)
    cache.lengths[rows] += t
    return _norm(w, "ln_f", config, x[:, -1]) if config.final_norm else x[:, -1]


def _norm(w: Params, name: str, config: ModelConfig, x: Array) -> Array:
    """Return the RMSNorm of x, or GPT-2's LayerNorm with the weights under this name."""
    if not config.is_gpt2:
        return _rms_norm(x)
    rows = x.reshape(-1, x.shape[-1])
    hat, inv = np.empty_like(rows), np.empty(len(rows), x.dtype)
    gpt2.layer_norm(rows, hat, inv)
    hat *= w[f"{name}.weight"]
    if config.bias:
        hat += w[f"{name}.bias"]
    return hat.reshape(x.shape)


def _rms_norm(x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    out, inv_rms = np.empty_like(rows), np.empty(len(rows), x.dtype)
    ops.rms_norm(rows, out, inv_rms)
    return out.reshape(x.shape)


def _linear(w: Params, name: str, config: ModelConfig, x: Array) -> Array:
    """Compute x Wᵀ, plus the bias if the model has biases; (B, T, K) to (B, T, M).

    It is one product of two matrices: of three dimensions NumPy would make one of each sequence.
    """
    weight = w[f"{name}.weight"]  # (M, K)
    out = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], len(weight))
    if config.bias:
        out += w[f"{name}.bias"]
    return np.asarray(out)


def _activate(config: ModelConfig, h: Array) -> Array:
    """Return the activation of h (B, T, F)."""
    if config.activation == "relu2":
        h = np.maximum(h, 0)
        return np.asarray(h * h)
    a = np.empty_like(h)
    (gpt2.gelu if config.activation == "gelu" else gpt2.gelu_tanh)(h, a)
    return a


def _shift(config: ModelConfig, norm: Array, last: Array) -> Array:
    """Return norm (B, T, C) with its first half from the position before, if the model shifts.

    `last` (B, C/2) holds that half of the latest position, and is updated.
    """
    if not config.token_shift:
        return norm
    half = last.shape[-1]
    before = np.concatenate([last[:, None], norm[:, :-1, :half]], axis=1)
    last[...] = norm[:, -1, :half]
    return np.concatenate([before, norm[:, :, half:]], axis=-1)


def attend(
    qkv: Array, config: ModelConfig, layer: int, cache: NumpyCache, target: WriteSlots
) -> Array:
    """Store keys and values of qkv (B, T, 3C); return the attention of its queries, (B, T, C)."""
    b, t, _ = qkv.shape
    q, k, v = ops.heads(qkv, config.n_head, 3)  # (B, H, T, D)
    keys, values = cache.k[layer, target.rows], cache.v[layer, target.rows]  # (B, H, D, W)
    if len(target.slots) == 1:
        slots = slice(target.slots[0], target.slots[0] + t)
        keys[..., slots], values[..., slots] = k.swapaxes(-1, -2), v.swapaxes(-1, -2)
    else:
        each = np.arange(b)
        keys[each, :, :, target.slots], values[each, :, :, target.slots] = k[:, :, 0], v[:, :, 0]
    scores = q @ keys[..., : target.n_read]  # (B, H, T, S)
    scores *= config.head_size**-0.5
    scores = scores.swapaxes(-1, -2)  # (B, H, S, T)
    if t > 1:
        ops.causal_softmax(scores, 0, config.qk_norm)
    else:
        if target.hidden is not None:
            scores += target.hidden
        scores -= scores.max(axis=-2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-2, keepdims=True)
    y: Array = values[..., : target.n_read] @ scores  # (B, H, D, T)
    return y.transpose(0, 3, 1, 2).reshape(b, t, config.n_embd)
