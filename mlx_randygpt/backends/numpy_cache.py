"""Decoding in NumPy: a KV cache and the forward pass of the newest tokens.

The cache is a ring of `block_size` slots. Turned keys carry their position with them, so the
order of the slots does not matter and dropping the oldest key is writing over it.

Legend: B streams, T new tokens, C n_embd, H heads, D = C/H, S filled slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_randygpt.backends import numpy_ops as ops
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import Array, Params


class NumpyCache:
    """Keys and values, (L, B, H, block_size, D) each; with token shift also the half of
    the last position that attention and MLP of each layer read next, (L, 2, B, C/2)."""

    def __init__(self, config: ModelConfig, batch_size: int, dtype: type) -> None:
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.head_size)
        self.k: Array = np.zeros(shape, dtype)
        self.v: Array = np.zeros(shape, dtype)
        self.last: Array = np.zeros((config.n_layer, 2, batch_size, config.n_embd // 2), dtype)
        self.length = 0

    def select(self, rows: Sequence[int]) -> None:
        self.k, self.v = self.k[:, list(rows)], self.v[:, list(rows)]
        self.last = self.last[:, :, list(rows)]


def decode(w: Params, config: ModelConfig, tokens: Array, cache: NumpyCache) -> Array:
    """`Backend.logits`: (B, T) ids -> (B, V) float32. An empty cache takes up to block_size
    tokens at once, a filled one takes them one by one. ValueError where T, an id or a learned
    position is out of range."""
    t, size = tokens.shape[1], config.block_size
    if not 1 <= t <= size:
        raise ValueError(f"{t} tokens at once; it must be 1 to block_size={size}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(f"token ids must be in 0..{config.vocab_size - 1}")
    if config.position == "learned" and cache.length + t > size:
        raise ValueError(f"{cache.length} + {t} positions pass block_size={size}, the last learned")
    for part in [tokens] if cache.length == 0 else np.split(tokens, t, axis=1):
        x = _advance(w, config, part, cache)
    if config.final_norm:
        x = _norm(x)
    return (x @ w["lm_head.weight"].T).astype(np.float32, copy=False)  # (B, V)


def _advance(w: Params, config: ModelConfig, tokens: Array, cache: NumpyCache) -> Array:
    """Append tokens (B, T) to the cache; the residual stream of the last position, (B, C)."""
    b, t = tokens.shape
    positions = np.arange(cache.length, cache.length + t)
    x = w["wte.weight"][tokens]  # (B, T, C)
    if config.position == "learned":
        x = x + w["wpe.weight"][positions]
    phases = ops.rope_phases(positions, config.head_size, 2 * config.n_head, x.dtype.type)
    for i in range(config.n_layer):
        inputs = _shift(config, _norm(x), cache.last[i, 0])
        qkv = inputs @ w[f"h.{i}.attn.c_attn.weight"].T  # (B, T, 3C)
        qk = qkv[:, :, : 2 * config.n_embd]
        if config.qk_norm:
            per_head = qk.reshape(b, t, 2 * config.n_head, config.head_size)
            per_head[...] = _norm(per_head)
        if config.position == "rope":
            ops.rotate(qk, phases)
        y = _attend(qkv, config, i, cache)  # (B, T, C)
        x = x + y @ w[f"h.{i}.attn.c_proj.weight"].T
        inputs = _shift(config, _norm(x), cache.last[i, 1])
        h = np.maximum(inputs @ w[f"h.{i}.mlp.c_fc.weight"].T, 0)  # (B, T, F)
        x = x + (h * h) @ w[f"h.{i}.mlp.c_proj.weight"].T
    cache.length += t
    return x[:, -1]


def _shift(config: ModelConfig, norm: Array, last: Array) -> Array:
    """norm (B, T, C), its first half from the position before; `last` (B, C/2) is the latest."""
    if not config.token_shift:
        return norm
    half = last.shape[-1]
    before = np.concatenate([last[:, None], norm[:, :-1, :half]], axis=1)
    last[...] = norm[:, -1, :half]
    return np.concatenate([before, norm[:, :, half:]], axis=-1)


def _attend(qkv: Array, config: ModelConfig, layer: int, cache: NumpyCache) -> Array:
    b, t, _ = qkv.shape
    q, k, v = ops.heads(qkv, config.n_head, 3)  # (B, H, T, D)
    slot = cache.length % config.block_size
    keys, values = cache.k[layer], cache.v[layer]
    keys[:, :, slot : slot + t], values[:, :, slot : slot + t] = k, v
    filled = min(cache.length + t, config.block_size)
    scores = keys[:, :, :filled] @ q.swapaxes(-1, -2)  # (B, H, S, T)
    scores *= config.head_size**-0.5
    if t > 1:
        ops.causal_softmax(scores, 0, config.qk_norm)
    else:
        scores -= scores.max(axis=-2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-2, keepdims=True)
    y: Array = scores.swapaxes(-1, -2) @ values[:, :, :filled]  # (B, H, T, D)
    return y.transpose(0, 2, 1, 3).reshape(b, t, config.n_embd)


def _norm(x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    out, inv = np.empty_like(rows), np.empty(len(rows), x.dtype)
    ops.rms_norm(rows, out, inv)
    return out.reshape(x.shape)
