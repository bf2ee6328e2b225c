"""The GPT in MLX: modules named as the published weights, and the forward pass.

Imports only MLX and the standard library, so that an export can ship this file as it is.

Legend: B batch, T time, C n_embd, H heads, D = C/H, F = 4C, V vocab, L layers, S keys in view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

EPS = 1e-5  # of every RMSNorm


@dataclass(frozen=True)
class ModelArgs:
    """The fields of ModelConfig that a forward pass needs."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    position: str = "rope"  # "rope" | "learned"
    rope_base: float = 10000.0
    qk_norm: bool = True
    final_norm: bool = True
    token_shift: bool = False


def rms(x: mx.array) -> mx.array:
    """Return x / sqrt(mean(x²) + EPS) over the last axis, without a gain."""
    return mx.fast.rms_norm(x, None, EPS)


def drop(x: mx.array, p: float, keys: mx.array | None) -> mx.array:
    """Apply inverted dropout to x (B, T, C): zero with probability p, the rest times 1/(1-p).

    Each sequence has a key of its own, (2,), so that a part of a batch draws the same as the whole.
    Without keys there is no dropout.
    """
    if keys is None or p == 0:
        return x
    kept = mx.vmap(lambda key: mx.random.bernoulli(1 - p, x.shape[1:], key))(keys)  # (B, T, C)
    return mx.where(kept, x * (1 / (1 - p)), 0)


def shift(x: mx.array, cache: Any, slot: int) -> mx.array:
    """Replace the first half of x (B, T, C) by that of the position before (arXiv 2305.13048).

    Before the first position come zeros, or what the cache kept in this slot. The cache gets all
    positions, and keeps the last.
    """
    b, t, c = x.shape
    before = None if cache is None else cache.last[slot]
    if before is None:
        before = mx.zeros((b, 1, c), x.dtype)
    if cache is not None:
        cache.last[slot] = x
    if t > 1:
        before = mx.concatenate([before, x[:, :-1]], axis=1)  # (B, T, C)
    return mx.where(first_half(c), before, x)


@lru_cache
def first_half(width: int) -> mx.array:
    """Return which channels (C,) come from the position before, as a constant of a graph."""
    half = width // 2
    return mx.array([True] * half + [False] * (width - half))


def plain_rows(table: mx.array, ids: mx.array) -> mx.array:
    """Return `table[ids]`, (B, T, C) of (V, C)."""
    return table[ids]


def plain_branch(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return x and the token shift of its norm, (B, T, C) each."""
    return x, shift(rms(x), None, 0)


def plain_sum(x: mx.array, a: mx.array, w: mx.array) -> mx.array:
    """Return x + a wᵀ, (B, T, out)."""
    return x + a @ w.T


def rotate(x: mx.array, base: float, offset: Any = 0) -> mx.array:
    """Apply rotary positions (arXiv 2104.09864) to interleaved pairs of x (B, H, T, D)."""
    even = x.shape[-1] // 2 * 2  # an odd head keeps its last value
    return mx.fast.rope(x, even, traditional=True, base=base, scale=1.0, offset=offset)


@dataclass(frozen=True)
class Operations:
    """The operations that can be replaced by others with the same values and better gradients."""

    embed: Callable[[mx.array, mx.array], mx.array] = plain_rows
    branch: Callable[[mx.array], tuple[mx.array, mx.array]] = plain_branch
    squared_relu: Callable[[mx.array], mx.array] = lambda h: mx.square(nn.relu(h))
    add_product: Callable[[mx.array, mx.array, mx.array], mx.array] = plain_sum
    attention: Callable[..., mx.array] | None = None  # causal, of all positions at once


PLAIN = Operations()


class Embedding(nn.Embedding):  # type: ignore[misc]
    """An embedding that looks its rows up by `ops.embed`."""

    def __init__(self, n_rows: int, width: int, ops: Operations = PLAIN) -> None:
        super().__init__(n_rows, width)
        self.ops = ops

    def __call__(self, ids: mx.array) -> mx.array:
        """Map ids (B, T) to rows of the table, (B, T, C)."""
        return self.ops.embed(self.weight, ids)


class Attention(nn.Module):  # type: ignore[misc]
    """Causal self-attention; the rows of c_attn are query, key and value, each H slices of D."""

    def __init__(self, args: ModelArgs, ops: Operations = PLAIN) -> None:
        super().__init__()
        self.ops = ops
        self.n_head = args.n_head
        self.qk_norm = args.qk_norm
        self.rope_base = args.rope_base if args.position == "rope" else None
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd, bias=False)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd, bias=False)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """Map (B, T, C) to (B, T, C), attending under `mask`."""
        return self.c_proj(self.mix(x, mask, cache))

    def mix(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """Return the input of the last projection, (B, T, C)."""
        qkv = self.c_attn(x)  # (B, T, 3C)
        if self.ops.attention and cache is None:
            switches = {"qk_norm": self.qk_norm, "rope_base": self.rope_base}
            return self.ops.attention(qkv, self.n_head, **switches)
        return self.attend(qkv, mask, cache)

    def attend(self, qkv: mx.array, mask: Any, cache: Any) -> mx.array:
        """Return the mixed values (B, T, C) of qkv (B, T, 3C), under `mask`."""
        b, t, _ = qkv.shape
        heads = qkv.reshape(b, t, 3 * self.n_head, -1).transpose(0, 2, 1, 3)  # (B, 3H, T, D)
        qk, v = mx.split(heads, [2 * self.n_head], axis=1)  # (B, 2H, T, D), (B, H, T, D)
        if self.qk_norm:
            qk = rms(qk)
        if self.rope_base:
            qk = rotate(qk, self.rope_base, 0 if cache is None else cache.offset)
        q, k = mx.split(qk, 2, axis=1)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)  # (B, H, S, D)
        scale = q.shape[-1] ** -0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return y.transpose(0, 2, 1, 3).reshape(b, t, -1)


class MLP(nn.Module):  # type: ignore[misc]
    """Squared ReLU between two projections (arXiv 2109.08668)."""

    def __init__(self, args: ModelArgs, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=False)

    def hidden(self, x: mx.array) -> mx.array:
        """Return the input of the last projection, (B, T, F)."""
        return self.ops.squared_relu(self.c_fc(x))


class Block(nn.Module):  # type: ignore[misc]
    """Pre-norm residual block."""

    def __init__(self, args: ModelArgs, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.dropout = args.dropout
        self.token_shift = args.token_shift
        self.attn = Attention(args, ops)
        self.mlp = MLP(args, ops)

    def __call__(self, x: mx.array, mask: Any, cache: Any, keys: Sequence[Any]) -> mx.array:
        """Map (B, T, C) to (B, T, C); `keys` are the dropout keys of the two branches."""
        x, y = self.branch(x, cache, 0)
        x = self.join(x, self.attn.c_proj, self.attn.mix(y, mask, cache), keys[0])
        x, y = self.branch(x, cache, 1)
        return self.join(x, self.mlp.c_proj, self.mlp.hidden(y), keys[1])

    def branch(self, x: mx.array, cache: Any, slot: int) -> tuple[mx.array, mx.array]:
        """Return x and the input of attention (slot 0) or MLP (slot 1), (B, T, C) each."""
        if not self.token_shift:
            return x, rms(x)
        return self.ops.branch(x) if cache is None else (x, shift(rms(x), cache, slot))

    def join(self, x: mx.array, projection: Any, a: mx.array, key: mx.array | None) -> mx.array:
        """Return x (B, T, C) plus the projection of a branch's last activations, a."""
        if type(projection) is nn.Linear and (key is None or self.dropout == 0):
            return self.ops.add_product(x, a, projection.weight)
        return x + drop(projection(a), self.dropout, key)  # quantised, or beside adapters


class GPT(nn.Module):  # type: ignore[misc]
    """A function from token ids (B, T) int32 to logits (B, T, V), in the type of the weights.

    `cache` has one object per layer with `offset` (positions seen: an int, or an array (B,)),
    `update_and_fetch(k, v)` and, for the token shift, a list `last` of two. `mask` then selects the
    keys that each query attends to: "causal", None for all S, or booleans (T, S). `keys` (2L, B,
    2), one for each place and sequence, switch dropout on and decide it.

    `wrap` turns a block into the function that is called in its place if there is no cache.
    """

    def __init__(
        self,
        args: ModelArgs,
        *,
        ops: Operations = PLAIN,
        wrap: Callable[[Any], Callable[..., mx.array]] | None = None,
    ) -> None:
        super().__init__()
        self.args = args
        self.wrap = wrap
        self.wte = Embedding(args.vocab_size, args.n_embd, ops)
        if args.position == "learned":
            self.wpe = nn.Embedding(args.block_size, args.n_embd)
        self.h = [Block(args, ops) for _ in range(args.n_layer)]
        self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        mask: Any = "causal",
        keys: mx.array | None = None,
    ) -> mx.array:
        """Return the logits of tokens (B, T), (B, T, V)."""
        return self.lm_head(self.features(tokens, cache, mask, keys))  # (B, T, V)

    def features(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        mask: Any = "causal",
        keys: mx.array | None = None,
    ) -> mx.array:
        """Return the input of the head, (B, T, C); decoding needs it at the last position only."""
        x = self.wte(tokens)  # (B, T, C)
        if self.args.position == "learned":
            x = x + self.wpe(self.positions(tokens.shape[1], cache))
        caches = cache or [None] * len(self.h)
        places = [None] * (2 * len(self.h)) if keys is None else keys
        for i, block in enumerate(self.h):
            run = self.wrap(block) if self.wrap and cache is None else block
            x = run(x, mask, caches[i], places[2 * i : 2 * i + 2])
        return self.normalize_final(x)

    def normalize_final(self, x: mx.array) -> mx.array:
        """Apply the last norm to the residual stream, (B, T, C)."""
        return rms(x) if self.args.final_norm else x

    def positions(self, t: int, cache: Sequence[Any] | None) -> mx.array:
        """Return rows of wpe, (T,) or (B, T), clipped to the table because MLX checks no bounds."""
        offset = mx.array(cache[0].offset if cache else 0)
        return mx.minimum(offset[..., None] + mx.arange(t), self.args.block_size - 1)
