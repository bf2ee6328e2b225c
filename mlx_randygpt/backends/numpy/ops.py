"""The textbook: every operation of the model as a forward/backward pair over plain arrays.

Each writes to arrays of the caller (`out`), so that a step allocates nothing large. `dx` is the
gradient of the loss with respect to x. float32 in use, float64 in checks; no state, no threads.

Legend: B sequences, T time, C n_embd, H heads, D = C/H, F = 4C, V vocab, N = B·T.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from mlx_randygpt.state import IGNORED, Array

NORM_EPS = 1e-5
ATTENTION_BLOCK = 64  # queries that share one range of keys
SAFE_SCORE = 60.0  # e^±60, and sums of such numbers, are ordinary float32 numbers


def rms_norm(x: Array, out: Array, inv_rms: Array) -> None:
    """Compute y = x · inv_rms with inv_rms = (mean(x²) + eps)^-½ over the last axis.

    Shapes are (N, C) and (N,), or per head (N, H, D) and (N, H).
    """
    _dot_rows(x, x, inv_rms)
    inv_rms *= 1 / x.shape[-1]
    inv_rms += NORM_EPS
    np.sqrt(inv_rms, out=inv_rms)
    np.reciprocal(inv_rms, out=inv_rms)
    _times_rows(x, inv_rms, out)


def rms_norm_backward(dy: Array, y: Array, inv_rms: Array, scratch: Array) -> None:
    """Compute dx = inv_rms · (dy − y · mean(dy · y)), over dy; y is the norm's output."""
    dot = _dot_rows(dy, y, np.empty_like(inv_rms))
    dot *= 1 / y.shape[-1]
    _times_rows(y, dot, scratch)
    dy -= scratch
    _times_rows(dy, inv_rms, dy)


def _dot_rows(a: Array, b: Array, out: Array) -> Array:
    """Sum a·b along the last axis, by the function that is faster for this shape."""
    if a.ndim == 2:
        return np.vecdot(a, b, out=out)
    return np.einsum("nhd,nhd->nh", a, b, out=out)


def _times_rows(x: Array, factor: Array, out: Array) -> None:
    """Compute x · factor[..., None].

    NumPy's inner loop runs along the last axis. Over the short rows of heads it would restart
    thousands of times, so there the factor is repeated to the full shape first.
    """
    if x.ndim == 2:
        np.multiply(x, factor[:, None], out=out)
    else:
        np.multiply(x, np.repeat(factor, x.shape[-1], axis=-1).reshape(x.shape), out=out)


def token_shift(x: Array, out: Array) -> None:
    """Copy x to y, with the first half of the channels from x[t−1] and x[−1] = 0; (B, T, C).

    Branches that read y see pairs of neighbours (the token shift of RWKV, arXiv:2305.13048).
    """
    half = x.shape[-1] // 2
    out[:, 0, :half] = 0
    out[:, 1:, :half] = x[:, :-1, :half]
    out[:, :, half:] = x[:, :, half:]


def token_shift_backward(dy: Array) -> None:
    """Take the first half of the channels of dx[t] from dy[t+1], in place; dy (B, T, C)."""
    half = dy.shape[-1] // 2
    dy[:, :-1, :half] = dy[:, 1:, :half]
    dy[:, -1, :half] = 0


def rope_phases(positions: Array, rates: Array, copies: int, dtype: type) -> Array:
    """Return e^{i·t·ω_j} for the `rates` ω (n,) of `model.rope_rates`, for `copies` heads.

    Positions (…, T) give phases (…, T, copies, n). A head's values 2j and 2j+1 are one complex
    number; rotating it by t·ω_j makes q·k depend on the distance alone (Su et al. 2021,
    arXiv:2104.09864). Angles are float64 until the end.
    """
    angles = np.asarray(positions, np.float64)[..., None] * rates  # (…, T, n)
    phases = np.exp(1j * angles).astype(np.result_type(dtype, np.complex64))
    return np.tile(phases[..., None, :], (copies, 1))


def rotate(x: Array, phases: Array) -> None:
    """Multiply x (B, T, copies·D) by the phases, in place.

    Phases are (T, copies, ⌊D/2⌋), or (B, T, copies, ⌊D/2⌋) by sequence. If D is odd, the last value
    of a head is unchanged. The backward of a rotation is the rotation by the conjugate phases.
    """
    b, t, _ = x.shape
    copies, n = phases.shape[-2:]
    pairs = x.reshape(b, t, copies, -1)[..., : 2 * n].view(phases.dtype)  # (B, T, copies, n)
    np.multiply(pairs, phases, out=pairs)


def attention(qkv: Array, qt: Array, probs: Array, out: Array, *, qk_norm: bool) -> None:
    """Compute y = softmax(k qᵀ / √D)ᵀ v per head, each query over the keys up to its own.

    Of qkv (B, T, 3C) it writes the probabilities probs (B, H, Tk, Tq), which the backward pass
    needs, and y (B, T, C) to `out`; qt (S, H, D, T) is scratch. Keys come first, so that maxima and
    sums run along whole rows of memory. S sequences at a time stay in a core's cache from the
    first pass to the last. Blocks of queries skip the keys that come after all of them, so that
    part of `probs` is not written.
    """
    n_head = probs.shape[1]
    for rows in _groups(len(qkv), len(qt)):
        q, k, v = heads(qkv[rows], n_head, 3)
        y = heads(out[rows], n_head, 1)[0]
        scaled = qt[: len(q)]
        np.multiply(q.swapaxes(-1, -2), q.dtype.type(q.shape[-1] ** -0.5), out=scaled)
        for start, stop in _blocks(q.shape[-2]):
            block = probs[rows, :, :stop, start:stop]  # (S, H, stop, Tb)
            np.matmul(k[:, :, :stop], scaled[..., start:stop], out=block)
            causal_softmax(block, start, qk_norm)
            np.matmul(block.swapaxes(-1, -2), v[:, :, :stop], out=y[:, :, start:stop])


def attention_backward(
    dy: Array, y: Array, qkv: Array, probs: Array, dyt: Array, ds: Array, dqkv: Array
) -> None:
    """Compute dqkv from dy; shapes as in `attention`, scratch dyt (S, H, D, T), ds (S, H, T, T).

    With p for probs: dv = p dy; dp = v dyᵀ; ds = p · (dp − δ) / √D with
    δ[i] = Σ_j p[j, i]·dp[j, i] = dy[i]·y[i]; dk = ds q; dq = dsᵀ k.
    """
    n_head = probs.shape[1]
    scale = qkv.dtype.type(dyt.shape[-2] ** -0.5)
    by_head = (*dy.shape[:2], n_head, -1)
    delta = np.einsum("bthd,bthd->bht", dy.reshape(by_head), y.reshape(by_head)) * scale
    for rows in _groups(len(qkv), len(dyt)):
        q, k, v = heads(qkv[rows], n_head, 3)
        dq, dk, dv = heads(dqkv[rows], n_head, 3)
        d_heads = heads(dy[rows], n_head, 1)[0]
        scaled = dyt[: len(q)]
        np.multiply(d_heads.swapaxes(-1, -2), scale, out=scaled)
        for start, stop in _blocks(q.shape[-2]):
            block = ds[: len(q), :, :stop, start:stop]  # (S, H, stop, Tb)
            np.matmul(v[:, :, :stop], scaled[..., start:stop], out=block)
            block -= delta[rows, :, None, start:stop]
            block *= probs[rows, :, :stop, start:stop]
            np.matmul(block.swapaxes(-1, -2), k[:, :, :stop], out=dq[:, :, start:stop])
        for start, stop in _blocks(q.shape[-2]):  # blocks of keys, with the queries that see them
            seen, dseen = (a[:, :, start:stop, start:] for a in (probs[rows], ds[: len(q)]))
            np.matmul(seen, d_heads[:, :, start:], out=dv[:, :, start:stop])
            np.matmul(dseen, q[:, :, start:], out=dk[:, :, start:stop])


def _groups(n: int, size: int) -> list[slice]:
    """Cut range(n) into slices of `size`."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _blocks(t: int) -> list[tuple[int, int]]:
    """Return ranges of positions; short contexts are not cut, since small products are slow."""
    size = t if t < 2 * ATTENTION_BLOCK else ATTENTION_BLOCK
    return [(start, min(start + size, t)) for start in range(0, t, size)]


def causal_softmax(scores: Array, first: int, qk_norm: bool) -> None:
    """Compute exp(s[j, i]) / Σ_j exp(s[j, i]) over the keys j ≤ first + i, in place.

    Scores are (B, H, first + Tq, Tq). With QK-norm |s| ≤ √D; else the maximum is subtracted if a
    score is so large that its exponential could overflow float32.
    """
    visible, hidden = _triangle(scores.shape[-1], scores.dtype)
    if qk_norm or max(scores.max(), -scores.min()) < SAFE_SCORE:
        np.exp(scores, out=scores)
        scores[:, :, first:] *= visible
    else:
        scores[:, :, first:] += hidden
        scores -= scores.max(axis=-2, keepdims=True)
        np.exp(scores, out=scores)
    scores /= np.ones((1, scores.shape[-2]), scores.dtype) @ scores  # (B, H, 1, Tq), the sums


@lru_cache(maxsize=8)
def _triangle(t: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return two masks (Tk, Tq) of key ≤ query: 1 and 0 to multiply by, 0 and −inf to add."""
    visible = np.triu(np.ones((t, t), dtype))
    return visible, np.where(visible == 1, 0, -np.inf).astype(dtype)


def heads(x: Array, n_head: int, parts: int) -> tuple[Array, ...]:
    """Split x (B, T, parts·C) into `parts` views of (B, H, T, D)."""
    b, t, width = x.shape
    split = x.reshape(b, t, parts, n_head, width // (parts * n_head))
    return tuple(split[:, :, i].transpose(0, 2, 1, 3) for i in range(parts))


def relu_squared(h: Array, out: Array) -> None:
    """Compute a = max(h, 0)²; h keeps max(h, 0) for the backward pass (So et al. 2021, Primer)."""
    np.maximum(h, np.zeros_like(h[:1]), out=h)  # twice as fast as against the number 0
    np.multiply(h, h, out=out)


def relu_squared_again(relu: Array, out: Array) -> None:
    """Compute a = relu² from the max(h, 0) that `relu_squared` left in h."""
    np.multiply(relu, relu, out=out)


def relu_squared_backward(da: Array, relu: Array) -> None:
    """Compute dh = 2 · relu · da with relu = max(h, 0), over da."""
    da *= relu
    da *= 2


def cross_entropy(logits: Array, targets: Array) -> float:
    """Return Σ −log softmax(logits)[target] over the targets that are not ignored.

    The logits (N, V) become probabilities.
    """
    logits -= logits.max(axis=-1, keepdims=True)
    rows = np.flatnonzero(targets != IGNORED)
    picked = logits[rows, targets[rows]]
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)  # (N, 1)
    logits /= total
    return float(np.log(total[rows, 0]).sum(dtype=np.float64) - picked.sum(dtype=np.float64))


def cross_entropy_backward(probabilities: Array, targets: Array, scale: float) -> None:
    """Compute dlogits = scale · (p − onehot(target)), 0 if ignored, over p (N, V)."""
    rows = np.flatnonzero(targets != IGNORED)
    probabilities[rows, targets[rows]] -= 1
    probabilities *= scale
    if len(rows) < len(targets):
        probabilities[targets == IGNORED] = 0


def embedding_backward(dx: Array, tokens: Array, dwte: Array) -> None:
    """Add to dwte[v] the sum of dx[n] over the positions n of token v; dx (N, C), dwte (V, C)."""
    order = np.argsort(tokens, kind="stable")
    in_order = tokens[order]
    starts = np.flatnonzero(np.diff(in_order, prepend=-1))
    dwte[in_order[starts]] += np.add.reduceat(dx[order], starts, axis=0)


def dropout_mask(random: np.random.Generator, p: float, out: Array) -> None:
    """Write 1/(1−p) with probability 1−p, else 0 (inverted dropout).

    p is rounded to the nearest 1/65,536, since two random bytes decide each value.
    """
    words = random.bit_generator.random_raw(-(-out.size // 4))  # of 64 bits, so four values each
    draws = words.view(np.uint16)[: out.size].reshape(out.shape)
    np.multiply(
        draws >= np.uint16(min(65535, round(p * 65536))), out.dtype.type(1 / (1 - p)), out=out
    )
