"""Decoding in NumPy: a KV cache and the forward pass of the newest tokens.

Each row of the cache is a ring of `block_size` slots: position p lies in slot p % block_size.
Rotated keys carry their position with them, so the order of the slots does not matter, and the
newest key overwrites the oldest.

Legend: B sequences, T new tokens, C n_embd, H heads, D = C/H, F = 4C, W = block_size, S slots that
are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_randygpt.backends.base import check_decoding
from mlx_randygpt.backends.numpy import gpt2, ops
from mlx_randygpt.backends.numpy.model import head_weight
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameters, rope_rates
from mlx_randygpt.state import Array, Params

VECTOR = 16  # values; a head's values begin at a multiple of it
MAX_TRANSPOSED = 1 << 24  # values of all matrices; more are not copied
TOKENS_PER_THREAD = 64  # below it, threads lose more by waiting for the interpreter than they gain
COMPILED_TOKENS_PER_THREAD = 8
COMPILED_FROM = 2000  # tokens; from there on the time to load numba pays for itself


class NumpyCache:
    """Keys (L, B, H, D, W), values (L, B, W, H, ≥ D), and the length of each row.

    With token shift also the half of the last position that attention and MLP of each layer read
    next, (L, 2, B, C/2).
    """

    def __init__(self, config: ModelConfig, batch_size: int, dtype: type) -> None:
        n_layer, h, d, w = config.n_layer, config.n_head, config.head_size, config.block_size
        self.k: Array = np.zeros((n_layer, batch_size, h, d, w), dtype)
        self.v: Array = np.zeros((n_layer, batch_size, w, h, -(-d // VECTOR) * VECTOR), dtype)
        self.last: Array = np.zeros((config.n_layer, 2, batch_size, config.n_embd // 2), dtype)
        self.lengths: Array = np.zeros(batch_size, np.int64)
        self.packed = False  # whether keys are as `decode_numba` reads them

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
    hidden: Array | None  # (B, 1, 1, S), -inf if a row has no key there; None if all rows are full


def next_slots(cache: NumpyCache, rows: slice, t: int) -> WriteSlots:
    """Return the slots of the next T positions of these rows."""
    lengths, size = cache.lengths[rows], cache.v.shape[2]
    if (lengths == lengths[0]).all():
        lengths = lengths[:1]
    filled = np.minimum(lengths + t, size)
    n_read, hidden = int(filled.max()), None
    if filled.min() < n_read:
        empty = np.arange(n_read) >= filled[:, None]  # (B, S)
        hidden = np.where(empty, -np.inf, 0).astype(cache.k.dtype)[:, None, None]
    return WriteSlots(
        rows=rows,
        positions=lengths[:, None] + np.arange(t),
        slots=lengths % size,
        n_read=n_read,
        hidden=hidden,
    )


class Decoder:
    """`Backend.logits` for weights that change in place; call `forget_weights` after a change."""

    def __init__(self, config: ModelConfig, params: Params, pool: Executor, n_threads: int) -> None:
        self.config, self.params = config, params
        self.pool, self.n_threads = pool, n_threads
        self.n_decoded = 0
        self._packed: Any = None
        self._transposed: Params | None = None

    def forget_weights(self) -> None:
        """Drop the copies of the weights, which have changed; the next call makes new ones."""
        self._packed = self._transposed = None

    def logits(
        self, tokens: Array, cache: NumpyCache, rows: slice, lengths: Array | None = None
    ) -> Array:
        """Return logits as `Backend.logits` does; many rows are split over the threads."""
        check_decoding(self.config, tokens, cache.lengths[rows])
        (n, t), start = tokens.shape, rows.start or 0
        lengths = np.full(n, t) if lengths is None else lengths
        n_tokens = int(lengths.sum())
        self.n_decoded += n_tokens
        is_compiled = self.compiled
        fewest = COMPILED_TOKENS_PER_THREAD if is_compiled else TOKENS_PER_THREAD
        n_parts = max(1, min(self.n_threads, n, n_tokens // fewest))
        shares = np.arange(1, n_parts) * n_tokens // n_parts
        cuts = np.searchsorted(np.cumsum(lengths), shares)
        edges = np.unique([0, *cuts, n]).tolist()  # one prompt can be longer than a share
        logits: Array = np.empty((n, self.config.vocab_size), np.float32)
        advance = self._compiled_advance(cache) if is_compiled else self._plain_advance()

        def work(first: int, last: int) -> None:
            part = slice(start + first, start + last)
            advance(tokens[first:last], lengths[first:last], cache, part, logits[first:last])

        others = [self.pool.submit(work, *edge) for edge in pairwise(edges[1:])]
        work(0, edges[1])  # this thread would only wait
        for other in others:
            other.result()
        return logits

    def warm_up(self) -> None:
        """Use the compiled function from now on, if numba is installed."""
        self.n_decoded = max(self.n_decoded, COMPILED_FROM + 1)

    @property
    def compiled(self) -> bool:
        """Whether the compiled function is in use."""
        config, dtype = self.config, self.params["wte.weight"].dtype
        possible = not config.is_gpt2 and dtype == np.float32
        return possible and self.n_decoded > COMPILED_FROM and has_numba()

    def _compiled_advance(self, cache: NumpyCache) -> Callable[..., None]:
        """Return what `_advance` does as one compiled function."""
        from mlx_randygpt.backends.numpy import decode_numba

        if self._packed is None:
            self._packed = decode_numba.PackedWeights(self.config, self.params)
            self._transposed = None
        if not cache.packed:
            cache.k, cache.packed = decode_numba.pack_keys(cache.k), True
        advance: Callable[..., None] = self._packed.advance
        return advance

    def _plain_advance(self) -> Callable[..., None]:
        """Return `_advance` bound to the transposed weights, which all threads share."""
        if self._transposed is None:
            self._transposed = transposed(self.config, self.params)
        return partial(self._advance, self._transposed)

    def _advance(
        self,
        w: Params,
        tokens: Array,
        lengths: Array,
        cache: NumpyCache,
        rows: slice,
        logits: Array,
    ) -> None:
        """Append up to block_size tokens at once to empty rows, one at a time to others.

        The logits (B, V) of the last tokens are written to `logits`; `w` holds transposed weights.
        """
        if tokens.shape[1] > 1 and not cache.lengths[rows].any():
            x = advance(w, self.config, (tokens, lengths), cache, rows)
        else:
            assert lengths.min() == tokens.shape[1], "padding follows empty rows only"
            ones = np.ones(len(tokens), int)
            for column in tokens.T:
                x = advance(w, self.config, (column[:, None], ones), cache, rows)
        logits[...] = x @ w["head"]


def transposed(config: ModelConfig, params: Params) -> Params:
    """Return the weights with matrices (in, out), and the head's as "head".

    Copied, a product of few rows is twice as fast as with the transpose of (out, in).
    """
    matrices = {p.name: params[p.name].T for p in parameters(config) if p.is_block_matrix}
    matrices["head"] = head_weight(params).T
    if sum(matrix.size for matrix in matrices.values()) <= MAX_TRANSPOSED:
        matrices = {name: np.ascontiguousarray(matrix) for name, matrix in matrices.items()}
    return {**params, **matrices}


@lru_cache(maxsize=1)
def has_numba() -> bool:
    """Return whether numba is installed and supports this NumPy."""
    try:
        import_module("mlx_randygpt.backends.numpy.decode_numba")
    except ImportError:
        return False
    return True


def advance(
    w: Params, config: ModelConfig, new: tuple[Array, Array], cache: NumpyCache, rows: slice
) -> Array:
    """Append tokens to the rows; return the input of the head after the last of each, (B, C).

    `w` is `transposed`; `new` has tokens (B, T) and how many of each row count, (B,). Both
    architectures run here.
    """
    tokens, lengths = new
    (b, t), each, ends = tokens.shape, np.arange(len(tokens)), lengths - 1
    target = next_slots(cache, rows, t)
    x = w["wte.weight"][tokens]  # (B, T, C)
    if config.position == "learned":
        x += w["wpe.weight"][target.positions]
    n_rotated = 2 * config.n_head  # queries and keys
    if config.position == "rope":
        rates = rope_rates(config.head_size, config.rope_base)
        phases = ops.rope_phases(target.positions, rates, n_rotated, x.dtype.type)
    for i in range(config.n_layer):
        inputs = _norm(w, f"h.{i}.ln_1", config, x)
        if config.token_shift:
            _shift(inputs, cache.last[i, 0, rows], (each, ends))
        qkv = _linear(w, f"h.{i}.attn.c_attn", config, inputs)  # (B, T, 3C)
        qk = qkv[:, :, : 2 * config.n_embd]
        if config.qk_norm:
            per_head = qk.reshape(b, t, n_rotated, config.head_size)
            per_head /= _rms(per_head)
        if config.position == "rope":
            ops.rotate(qk, phases)
        y = attend(qkv, config, i, cache, target)  # (B, T, C)
        x += _linear(w, f"h.{i}.attn.c_proj", config, y)
        inputs = _norm(w, f"h.{i}.ln_2", config, x)
        if config.token_shift:
            _shift(inputs, cache.last[i, 1, rows], (each, ends))
        a = _activate(config, _linear(w, f"h.{i}.mlp.c_fc", config, inputs))  # (B, T, F)
        x += _linear(w, f"h.{i}.mlp.c_proj", config, a)
    cache.lengths[rows] += lengths
    x = x[each, ends]
    return _norm(w, "ln_f", config, x) if config.final_norm else x


def _norm(w: Params, name: str, config: ModelConfig, x: Array) -> Array:
    """Return the RMSNorm of x, or GPT-2's LayerNorm with the weights under this name."""
    if not config.is_gpt2:
        return np.asarray(x / _rms(x))
    rows = x.reshape(-1, x.shape[-1])
    hat, inv = np.empty_like(rows), np.empty(len(rows), x.dtype)
    gpt2.layer_norm(rows, hat, inv)
    hat *= w[f"{name}.weight"]
    if config.bias:
        hat += w[f"{name}.bias"]
    return hat.reshape(x.shape)


def _rms(x: Array) -> Array:
    """Return (mean(x²) + eps)^½ over the last axis, kept: RMSNorm in few calls, for few rows."""
    rms = np.vecdot(x, x)[..., None]
    rms *= 1 / x.shape[-1]
    rms += ops.NORM_EPS
    return np.asarray(np.sqrt(rms, out=rms))


def _linear(w: Params, name: str, config: ModelConfig, x: Array) -> Array:
    """Compute x Wᵀ, plus the bias if the model has biases; (B, T, K) to (B, T, M).

    It is one product of two matrices: of three dimensions NumPy would make one of each sequence. A
    single token is a vector, because BLAS multiplies a matrix by a vector faster than by a row.
    """
    weight, size = w[f"{name}.weight"], x.shape[-1]  # (K, M)
    tokens = x.reshape(size if x.size == size else (-1, size))
    out = (tokens @ weight).reshape(*x.shape[:-1], -1)
    if config.bias:
        out += w[f"{name}.bias"]
    return np.asarray(out)


def _activate(config: ModelConfig, h: Array) -> Array:
    """Return the activation of h (B, T, F), which is overwritten."""
    if config.activation == "relu2":
        np.maximum(h, 0, out=h)
        return np.multiply(h, h, out=h)
    a = np.empty_like(h)
    (gpt2.gelu if config.activation == "gelu" else gpt2.gelu_tanh)(h, a)
    return a


def _shift(norm: Array, last: Array, ends: tuple[Array, Array]) -> None:
    """Replace the first half of norm (B, T, C) by that of the position before.

    `last` (B, C/2) holds that half of the latest position, and gets that at the `ends`.
    """
    half = norm[:, :, : last.shape[-1]]
    before = np.concatenate([last[:, None], half[:, :-1]], axis=1)
    last[...] = half[ends]
    half[...] = before


def attend(
    qkv: Array, config: ModelConfig, layer: int, cache: NumpyCache, target: WriteSlots
) -> Array:
    """Store keys and values of qkv (B, T, 3C); return the attention of its queries, (B, T, C)."""
    b, t, _ = qkv.shape
    q, k, v = ops.heads(qkv, config.n_head, 3)  # (B, H, T, D)
    keys = cache.k[layer, target.rows]  # (B, H, D, W)
    values = cache.v[layer, target.rows, ..., : config.head_size].swapaxes(1, 2)  # (B, H, W, D)
    if len(target.slots) == 1:
        slots = slice(target.slots[0], target.slots[0] + t)
        keys[..., slots], values[:, :, slots] = k.swapaxes(-1, -2), v
    else:
        each = np.arange(b)
        keys[each, :, :, target.slots], values[each, :, target.slots] = k[:, :, 0], v[:, :, 0]
    scores = q @ keys[..., : target.n_read]  # (B, H, T, S)
    scores *= config.head_size**-0.5
    if t > 1:
        ops.causal_softmax(scores.swapaxes(-1, -2), 0, config.qk_norm)
    else:
        if target.hidden is not None:
            scores += target.hidden
        if not config.qk_norm:  # with it |s| ≤ √D
            scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
    y: Array = scores @ values[:, :, : target.n_read]  # (B, H, T, D)
    return y.swapaxes(1, 2).reshape(b, t, config.n_embd)
