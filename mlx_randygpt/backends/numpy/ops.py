"""The textbook: every operation of the model as a forward/backward pair over plain arrays.

Each writes where it is told (`out`), so that nothing is allocated inside a step. `dx` names the
gradient of the loss with respect to x. float32 in use, float64 in checks; no state, no threads.

Legend: B sequences, T time, C n_embd, H heads, D = C/H, F = 4C, V vocab, N = B·T.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from mlx_randygpt.state import IGNORED, Array

NORM_EPS = 1e-5
ROPE_BASE = 10000.0
ATTENTION_BLOCK = 64  # queries whose keys are cut together
SAFE_SCORE = 60.0  # e^±60, and sums of such numbers, are ordinary float32 numbers


def rms_norm(x: Array, out: Array, inv: Array) -> None:
    """y = x · inv, inv = (mean(x²) + eps)^-½ over the last axis; (N, C) and (N,), or
    per head (N, H, D) and (N, H)."""
    _dot_rows(x, x, inv)
    inv *= 1 / x.shape[-1]
    inv += NORM_EPS
    np.sqrt(inv, out=inv)
    np.reciprocal(inv, out=inv)
    _times_rows(x, inv, out)


def rms_norm_backward(dy: Array, y: Array, inv: Array, scratch: Array) -> None:
    """dx = inv · (dy − y · mean(dy · y)), written over dy; y is the norm's output."""
    dot = _dot_rows(dy, y, np.empty_like(inv))
    dot *= 1 / y.shape[-1]
    _times_rows(y, dot, scratch)
    dy -= scratch
    _times_rows(dy, inv, dy)


def _dot_rows(a: Array, b: Array, out: Array) -> Array:
    """Σ a·b along the last axis; of two equal ways, the one that is fast on rows this wide."""
    if a.ndim == 2:
        return np.vecdot(a, b, out=out)
    return np.einsum("nhd,nhd->nh", a, b, out=out)


def _times_rows(x: Array, factor: Array, out: Array) -> None:
    """x · factor[..., None]. NumPy's inner loop runs along the last axis that differs: over the
    short rows of heads it would be restarted thousands of times, so there the factor is spread."""
    if x.ndim == 2:
        np.multiply(x, factor[:, None], out=out)
    else:
        np.multiply(x, np.repeat(factor, x.shape[-1], axis=-1).reshape(x.shape), out=out)


def token_shift(x: Array, out: Array) -> None:
    """y[t] = x[t], but the first half of its channels is that of x[t−1], with x[−1] = 0;
    (B, T, C). What reads y sees pairs of neighbours (the token shift of RWKV, arXiv:2305.13048)."""
    half = x.shape[-1] // 2
    out[:, 0, :half] = 0
    out[:, 1:, :half] = x[:, :-1, :half]
    out[:, :, half:] = x[:, :, half:]


def token_shift_backward(dy: Array) -> None:
    """dx[t] = dy[t], but the first half of its channels is that of dy[t+1]; over dy (B, T, C)."""
    half = dy.shape[-1] // 2
    dy[:, :-1, :half] = dy[:, 1:, :half]
    dy[:, -1, :half] = 0


def rope_phases(positions: Array, head_size: int, copies: int, dtype: type) -> Array:
    """e^{i·t·ω_j}, ω_j = base^(−j/n) for pair j of n = ⌊D/2⌋, for `copies` heads;
    positions (…, T) -> (…, T, copies, n).

    A head's values 2j and 2j+1 are one complex number; turning it by t·ω_j makes q·k depend on
    the distance alone (Su et al. 2021, arXiv:2104.09864). Angles are float64 until the end.
    """
    n = head_size // 2
    rates = ROPE_BASE ** (-np.arange(n) / n)
    angles = np.asarray(positions, np.float64)[..., None] * rates  # (…, T, n)
    phases = np.exp(1j * angles).astype(np.result_type(dtype, np.complex64))
    return np.tile(phases[..., None, :], (copies, 1))


def rotate(x: Array, phases: Array) -> None:
    """x · e^{iθ} in place; x (B, T, copies·D), phases (T, copies, ⌊D/2⌋) or of each sequence (B, T,
    copies, ⌊D/2⌋). Of an odd head the last value stays. The backward of a rotation is the rotation
    by the conjugate phases."""
    b, t, _ = x.shape
    copies, n = phases.shape[-2:]
    pairs = x.reshape(b, t, copies, -1)[..., : 2 * n].view(phases.dtype)  # (B, T, copies, n)
    np.multiply(pairs, phases, out=pairs)


def attention(qkv: Array, n_head: int, normed: bool, qt: Array, p: Array, out: Array) -> None:
    """y = softmax(k qᵀ / √D)ᵀ v per head, each query over the keys up to its own; qkv (B, T, 3C).

    Writes the probabilities p (B, H, Tk, Tq), which the backward pass needs, and y (B, T, C); qt
    (S, H, D, T) is scratch. Keys come first, so that maxima and sums run along whole rows of
    memory. S sequences at a time stay in a core's cache from the first pass to the last; blocks
    of queries leave out the keys that none of them may see.
    """
    for rows in _groups(len(qkv), len(qt)):
        q, k, v = heads(qkv[rows], n_head, 3)
        y = heads(out[rows], n_head, 1)[0]
        turned = qt[: len(q)]
        np.multiply(q.swapaxes(-1, -2), q.dtype.type(q.shape[-1] ** -0.5), out=turned)
        for start, stop in _blocks(q.shape[-2]):
            block = p[rows, :, :stop, start:stop]  # (S, H, stop, Tb)
            np.matmul(k[:, :, :stop], turned[..., start:stop], out=block)
            causal_softmax(block, start, normed)
            np.matmul(block.swapaxes(-1, -2), v[:, :, :stop], out=y[:, :, start:stop])


def attention_backward(
    dy: Array, y: Array, qkv: Array, p: Array, n_head: int, dyt: Array, ds: Array, dqkv: Array
) -> None:
    """dv = p dy; dp = v dyᵀ; ds = p · (dp − δ) / √D with δ[i] = Σ_j p[j, i]·dp[j, i] = dy[i]·y[i];
    dk = ds q; dq = dsᵀ k. Shapes as in `attention`; scratch: dyt (S, H, D, T), ds (S, H, T, T)."""
    scale = qkv.dtype.type(dyt.shape[-2] ** -0.5)
    by_head = (*dy.shape[:2], n_head, -1)
    delta = np.einsum("bthd,bthd->bht", dy.reshape(by_head), y.reshape(by_head)) * scale
    for rows in _groups(len(qkv), len(dyt)):
        q, k, v = heads(qkv[rows], n_head, 3)
        dq, dk, dv = heads(dqkv[rows], n_head, 3)
        d_heads = heads(dy[rows], n_head, 1)[0]
        turned = dyt[: len(q)]
        np.multiply(d_heads.swapaxes(-1, -2), scale, out=turned)
        for start, stop in _blocks(q.shape[-2]):
            block = ds[: len(q), :, :stop, start:stop]  # (S, H, stop, Tb)
            np.matmul(v[:, :, :stop], turned[..., start:stop], out=block)
            block -= delta[rows, :, None, start:stop]
            block *= p[rows, :, :stop, start:stop]
            np.matmul(block.swapaxes(-1, -2), k[:, :, :stop], out=dq[:, :, start:stop])
        for start, stop in _blocks(q.shape[-2]):  # now of keys, with the queries that see them
            seen, dseen = (a[:, :, start:stop, start:] for a in (p[rows], ds[: len(q)]))
            np.matmul(seen, d_heads[:, :, start:], out=dv[:, :, start:stop])
            np.matmul(dseen, q[:, :, start:], out=dk[:, :, start:stop])


def _groups(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _blocks(t: int) -> list[tuple[int, int]]:
    """Ranges of positions; short contexts stay whole, for small products are slow ones."""
    size = t if t < 2 * ATTENTION_BLOCK else ATTENTION_BLOCK
    return [(start, min(start + size, t)) for start in range(0, t, size)]


def causal_softmax(scores: Array, first: int, normed: bool) -> None:
    """p[j, i] = exp(s[j, i]) / Σ_j exp(s[j, i]) over the keys j ≤ first + i, in place;
    (B, H, first + Tq, Tq). Where queries and keys are normed, |s| ≤ √D; elsewhere the maximum is
    taken out if a score is so large that its exponential could leave float32."""
    visible, hidden = _triangle(scores.shape[-1], scores.dtype)
    if normed or max(scores.max(), -scores.min()) < SAFE_SCORE:
        np.exp(scores, out=scores)
        scores[:, :, first:] *= visible
    else:
        scores[:, :, first:] += hidden
        scores -= scores.max(axis=-2, keepdims=True)
        np.exp(scores, out=scores)
    scores /= np.ones((1, scores.shape[-2]), scores.dtype) @ scores  # (B, H, 1, Tq), the sums


@lru_cache(maxsize=8)
def _triangle(t: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """1 where key ≤ query and else 0; 0 where key ≤ query and else −inf; both (Tk, Tq)."""
    visible = np.triu(np.ones((t, t), dtype))
    return visible, np.where(visible == 1, 0, -np.inf).astype(dtype)


def heads(x: Array, n_head: int, parts: int) -> tuple[Array, ...]:
    """(B, T, parts·C) -> `parts` views of (B, H, T, D)."""
    b, t, width = x.shape
    split = x.reshape(b, t, parts, n_head, width // (parts * n_head))
    return tuple(split[:, :, i].transpose(0, 2, 1, 3) for i in range(parts))


def relu_squared(h: Array, out: Array) -> None:
    """a = max(h, 0)²; h keeps max(h, 0) for the backward pass (So et al. 2021, Primer)."""
    np.maximum(h, np.zeros_like(h[:1]), out=h)  # twice as fast as against the number 0
    np.multiply(h, h, out=out)


def relu_squared_again(r: Array, out: Array) -> None:
    """a = r² from what `relu_squared` left in h."""
    np.multiply(r, r, out=out)


def relu_squared_backward(da: Array, r: Array) -> None:
    """dh = 2 · max(h, 0) · da, written over da; r = max(h, 0)."""
    da *= r
    da *= 2


def cross_entropy(logits: Array, targets: Array) -> float:
    """Σ −log softmax(logits)[target] over the targets that count; logits (N, V) become
    probabilities."""
    logits -= logits.max(axis=-1, keepdims=True)
    rows = np.flatnonzero(targets != IGNORED)
    picked = logits[rows, targets[rows]]
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)  # (N, 1)
    logits /= total
    return float(np.log(total[rows, 0]).sum(dtype=np.float64) - picked.sum(dtype=np.float64))


def cross_entropy_backward(probabilities: Array, targets: Array, scale: float) -> None:
    """dlogits = scale · (p − onehot(target)), zero where ignored; written over p (N, V)."""
    rows = np.flatnonzero(targets != IGNORED)
    probabilities[rows, targets[rows]] -= 1
    probabilities *= scale
    if len(rows) < len(targets):
        probabilities[targets == IGNORED] = 0


def embedding_backward(dx: Array, tokens: Array, dwte: Array) -> None:
    """dwte[v] += Σ dx[n] over the positions n that hold token v; dx (N, C), dwte (V, C)."""
    order = np.argsort(tokens, kind="stable")
    found = tokens[order]
    starts = np.flatnonzero(np.diff(found, prepend=-1))
    dwte[found[starts]] += np.add.reduceat(dx[order], starts, axis=0)


def dropout_mask(random: np.random.Generator, p: float, out: Array) -> None:
    """1/(1−p) with probability 1−p, else 0 (inverted dropout); p to the nearest 1/65,536, since
    two random bytes decide each value."""
    words = random.bit_generator.random_raw(-(-out.size // 4))  # of 64 bits, so four values each
    draws = words.view(np.uint16)[: out.size].reshape(out.shape)
    np.multiply(
        draws >= np.uint16(min(65535, round(p * 65536))), out.dtype.type(1 / (1 - p)), out=out
    )
