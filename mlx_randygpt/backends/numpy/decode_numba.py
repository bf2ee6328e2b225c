"""The forward pass of one new token of each of some sequences, as one compiled function.

The arithmetic is that of `decode` without its hundreds of calls, which take longer than the
products of a small model. Needs numba (the extra `fast`); without it `decode` computes the same.

Legend: B sequences, C n_embd, H heads, D = C/H, V vocab, L layers, W = block_size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from mlx_randygpt.backends.numpy.ops import NORM_EPS, ROPE_BASE
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameters
from mlx_randygpt.state import Array

ROWS = 16  # sequences computed at a time: their activations stay in a core's L1 cache
compiled = njit(nogil=True, cache=True, fastmath=True)


@lru_cache(maxsize=8)
def weight_starts(config: ModelConfig) -> Array:
    """Return where each weight begins in the flat vector, (4L + 3,).

    The order is wte, wpe (wte again if there is none), four matrices of each layer, lm_head.
    """
    weights = parameters(config)
    ends = np.cumsum([weight.size for weight in weights])
    starts = {w.name: end - w.size for w, end in zip(weights, ends, strict=True)}
    starts.setdefault("wpe.weight", starts["wte.weight"])
    matrices = [weight.name for weight in weights if weight.is_block_matrix]
    return np.array([starts[n] for n in ("wte.weight", "wpe.weight", *matrices, "lm_head.weight")])


def logits(config: ModelConfig, flat: Array, tokens: Array, cache: Any, rows: slice) -> Array:
    """Append tokens (B, T) to the rows of a NumpyCache one by one; return float32 logits (B, V)."""
    out: Array = np.empty((len(tokens), config.vocab_size), flat.dtype)
    for column in tokens.T:
        advance(
            flat,
            weight_starts(config),
            config.position == "learned",
            config.position == "rope",
            config.qk_norm,
            config.token_shift,
            config.final_norm,
            np.array(column, np.int64),
            cache.lengths,
            cache.k,
            cache.v,
            cache.last,
            rows.start,
            out,
        )
    return out.astype(np.float32, copy=False)


@compiled
def advance(  # noqa: PLR0913
    flat: Array,
    starts: Array,
    learned: bool,
    rotary: bool,
    qk_norm: bool,
    shifted: bool,
    final_norm: bool,
    tokens: Array,
    lengths: Array,
    keys: Array,
    values: Array,
    last: Array,
    start_row: int,
    logits: Array,
) -> None:
    """Append tokens (B,) to the B rows of a cache from `start_row` on; write their logits (B, V).

    flat holds the weights, which begin at the `starts` of `weight_starts`. lengths (rows,), keys
    and values (L, rows, H, D, W) and last (L, 2, rows, C/2) are the whole cache.
    """
    n_layer, _, n_head, d, size = keys.shape
    c, vocab = n_head * d, logits.shape[1]
    wte = flat[starts[0] : starts[0] + vocab * c].reshape(vocab, c)
    lm_head = flat[starts[-1] : starts[-1] + vocab * c].reshape(vocab, c)
    scores = np.empty(size, flat.dtype)
    for first in range(0, len(tokens), ROWS):
        n = min(ROWS, len(tokens) - first)
        row = start_row + first  # of the cache; its rows are row + b
        x, inputs = np.empty((n, c), flat.dtype), np.empty((n, c), flat.dtype)
        qkv, h = np.empty((n, 3 * c), flat.dtype), np.empty((n, 4 * c), flat.dtype)
        for b in range(n):
            x[b] = wte[tokens[first + b]]
            if learned:
                start = starts[1] + lengths[row + b] * c
                x[b] += flat[start : start + c]
        for i in range(n_layer):
            start = starts[2 + 4 * i]
            c_attn = flat[start : start + 3 * c * c].reshape(3 * c, c)
            start = starts[3 + 4 * i]
            attn_proj = flat[start : start + c * c].reshape(c, c)
            start = starts[4 + 4 * i]
            c_fc = flat[start : start + 4 * c * c].reshape(4 * c, c)
            start = starts[5 + 4 * i]
            mlp_proj = flat[start : start + 4 * c * c].reshape(c, 4 * c)
            for b in range(n):
                _branch_input(x[b], last[i, 0, row + b], shifted, inputs[b])
            _linear(inputs, c_attn, qkv, False)
            for b in range(n):
                _attend(
                    qkv[b],
                    keys[i, row + b],
                    values[i, row + b],
                    lengths[row + b],
                    qk_norm,
                    rotary,
                    scores,
                    inputs[b],
                )
            _linear(inputs, attn_proj, x, True)
            for b in range(n):
                _branch_input(x[b], last[i, 1, row + b], shifted, inputs[b])
            _linear(inputs, c_fc, h, False)
            for b in range(n):
                for j in range(4 * c):
                    h[b, j] = max(h[b, j], h.dtype.type(0)) ** 2
            _linear(h, mlp_proj, x, True)
        for b in range(n):
            lengths[row + b] += 1
            if final_norm:
                _norm(x[b])
        _linear(x, lm_head, logits[first : first + n], False)


@compiled
def _linear(x: Array, w: Array, out: Array, adding: bool) -> None:
    """Compute out (B, M) = x (B, K) wᵀ, or add that to out; w (M, K).

    Four sequences at a time share each row of w that is loaded.
    """
    n, k = x.shape
    whole = n - n % 4
    for o in range(len(w)):
        row = w[o]
        for b in range(0, whole, 4):
            x0, x1, x2, x3 = x[b], x[b + 1], x[b + 2], x[b + 3]
            s0 = s1 = s2 = s3 = x.dtype.type(0)
            for i in range(k):
                s0 += row[i] * x0[i]
                s1 += row[i] * x1[i]
                s2 += row[i] * x2[i]
                s3 += row[i] * x3[i]
            if not adding:
                out[b, o] = out[b + 1, o] = out[b + 2, o] = out[b + 3, o] = 0
            out[b, o] += s0
            out[b + 1, o] += s1
            out[b + 2, o] += s2
            out[b + 3, o] += s3
        for b in range(whole, n):
            x0, s0 = x[b], x.dtype.type(0)
            for i in range(k):
                s0 += row[i] * x0[i]
            out[b, o] = s0 + out[b, o] if adding else s0


@compiled
def _norm(x: Array) -> None:
    """Compute x · (mean(x²) + eps)^-½ in place; (C,) or (D,)."""
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    inv = x.dtype.type(1 / np.sqrt(total / len(x) + NORM_EPS))
    for i in range(len(x)):
        x[i] *= inv


@compiled
def _branch_input(x: Array, last: Array, shifted: bool, out: Array) -> None:
    """Write the norm of x (C,), if shifted with the first half of the token before.

    `last` (C/2,) holds that half, and is updated.
    """
    out[:] = x
    _norm(out)
    if shifted:
        for i in range(len(last)):
            out[i], last[i] = last[i], out[i]


@compiled
def _attend(  # noqa: PLR0913
    qkv: Array,
    keys: Array,
    values: Array,
    position: int,
    qk_norm: bool,
    rotary: bool,
    scores: Array,
    y: Array,
) -> None:
    """Compute one sequence's attention in one layer: qkv (3C,) to y (C,).

    The new key and value are written to their slot of keys and values (H, D, W); scores (W,) is
    scratch.
    """
    n_head, d, size = keys.shape
    slot, seen = position % size, min(position + 1, size)
    rotations = np.empty((d // 2 if rotary else 0, 2), qkv.dtype)
    for j in range(len(rotations)):
        angle = position * ROPE_BASE ** (-j / len(rotations))
        rotations[j, 0], rotations[j, 1] = np.cos(angle), np.sin(angle)
    for h in range(n_head):
        q, k = qkv[h * d : (h + 1) * d], qkv[(n_head + h) * d : (n_head + h + 1) * d]
        if qk_norm:
            _norm(q)
            _norm(k)
        _rotate(q, rotations)
        _rotate(k, rotations)
        keys[h, :, slot] = k
        values[h, :, slot] = qkv[(2 * n_head + h) * d : (2 * n_head + h + 1) * d]
        _scores(q, keys[h], seen, scores)
        largest, total = scores[:seen].max(), scores.dtype.type(0)
        for j in range(seen):
            scores[j] = np.exp(scores[j] - largest)
            total += scores[j]
        for i in range(d):
            weighted, row = scores.dtype.type(0), values[h, i]
            for j in range(seen):
                weighted += scores[j] * row[j]
            y[h * d + i] = weighted / total


@compiled
def _scores(q: Array, keys: Array, seen: int, scores: Array) -> None:
    """Compute q · k / √D for the first `seen` keys (D, W).

    Four channels at a time share one load and store of each score.
    """
    d = len(q)
    scale = scores.dtype.type(d**-0.5)
    whole = d - d % 4
    scores[:seen] = 0
    for i in range(0, whole, 4):
        q0, q1, q2, q3 = scale * q[i], scale * q[i + 1], scale * q[i + 2], scale * q[i + 3]
        k0, k1, k2, k3 = keys[i], keys[i + 1], keys[i + 2], keys[i + 3]
        for j in range(seen):
            scores[j] += q0 * k0[j] + q1 * k1[j] + q2 * k2[j] + q3 * k3[j]
    for i in range(whole, d):
        for j in range(seen):
            scores[j] += scale * q[i] * keys[i, j]


@compiled
def _rotate(x: Array, rotations: Array) -> None:
    """Rotate each pair of x (D,) by its angle; rotations (D/2, 2) holds cosines and sines."""
    for j in range(len(rotations)):
        a, b = x[2 * j], x[2 * j + 1]
        x[2 * j] = a * rotations[j, 0] - b * rotations[j, 1]
        x[2 * j + 1] = a * rotations[j, 1] + b * rotations[j, 0]
