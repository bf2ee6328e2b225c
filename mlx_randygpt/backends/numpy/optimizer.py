"""AdamW and Muon in NumPy, in place, on slices of one flat vector per quantity.

The arithmetic is the same as in the MLX backend, line for line; `check` compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_randygpt.config import TrainConfig
from mlx_randygpt.state import Array

BLOCK = 1 << 14  # numbers per pass: five float32 vectors of this length stay in a core's L2
STACK = 1 << 18  # numbers in the matrices that Muon takes at a time
NS_STEPS = 5
BALANCE_EPS = 1e-10
NS_A, NS_B, NS_C = 3.4445, -4.7750, 2.0315


def adamw(
    w: Array,
    g: Array,
    moments: tuple[Array, Array],
    *,
    t: int,
    lr: float,
    decay: float,
    config: TrainConfig,
) -> None:
    """Take one AdamW step on equally long vectors (Loshchilov & Hutter 2019, arXiv:1711.05101).

    m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; w ← w − lr·(m̂ / (√v̂ + eps) + decay·w), with the
    hats dividing by 1−βᵗ; t counts from 1. Both hats are taken out of the fraction.
    """
    (m, v), b1, b2 = moments, config.beta1, config.beta2
    root = (1 - b2**t) ** 0.5
    scratch: Array = np.empty(min(BLOCK, len(w)), w.dtype)
    for start in range(0, len(w), BLOCK):
        block = slice(start, start + BLOCK)
        wb, gb, mb, vb = w[block], g[block], m[block], v[block]
        step = scratch[: len(wb)]
        np.multiply(gb, 1 - b1, out=step)
        mb *= b1
        mb += step
        np.multiply(gb, gb, out=step)
        step *= 1 - b2
        vb *= b2
        vb += step
        np.sqrt(vb, out=step)
        step += config.adam_eps * root
        np.divide(mb, step, out=step)
        step *= lr * root / (1 - b1**t)
        wb *= 1 - lr * decay
        wb -= step


def muon(
    ws: Sequence[Array],
    gs: Sequence[Array],
    ms: Sequence[Array],
    vs: Sequence[Array],
    *,
    lr: float,
    config: TrainConfig,
) -> None:
    """Take one Muon step on matrices (out, in) of one shape.

    From Jordan et al. 2024, github.com/KellerJordan/Muon:

    m ← μm + (1−μ)g; u = (1−μ)g + μm; w ← w − lr·(√max(1, out/in)·orthogonal(u) + decay·w).

    With `muon_beta2` above 0 the rows of orthogonal(u) are brought to one size; see `balance`.
    """
    momentum, decay, beta2 = config.momentum, config.weight_decay, config.muon_beta2
    n_out, n_in = ws[0].shape
    u: Array = np.empty((len(ws), n_out, n_in), ws[0].dtype)
    for g, m, row in zip(gs, ms, u, strict=True):
        np.multiply(g, 1 - momentum, out=row)
        m *= momentum
        m += row
        row += momentum * m
    update = orthogonal(u)
    if beta2 > 0:
        balance(update, vs, beta2)
    update *= lr * max(1.0, n_out / n_in) ** 0.5
    for w, row in zip(ws, update, strict=True):
        w *= 1 - lr * decay
        w -= row


def balance(u: Array, vs: Sequence[Array], beta2: float) -> None:
    """Divide each row of u (K, out, in) by the root of its running mean square, in place.

    The columns if it is wider than high, for they are its neurons. Each matrix keeps its norm, so
    that a common factor of v cancels and no bias needs correcting. After NorMuon (Li et al. 2025,
    arXiv:2510.05491): v ← β₂v + (1−β₂)·mean(u²); u ← u / (√v + eps), with u's old norm.
    """
    axis = 2 if u.shape[1] >= u.shape[2] else 1
    mean = np.square(u).mean(axis, keepdims=True)  # (K, out, 1) or (K, 1, in)
    for v, row in zip(vs, mean, strict=True):
        v *= beta2
        v += (1 - beta2) * row
    scale = 1 / (np.sqrt(np.stack(vs)) + BALANCE_EPS)
    norms = [np.sqrt(squares.sum((1, 2), keepdims=True)) for squares in (mean, mean * scale**2)]
    u *= scale * (norms[0] / (norms[1] + BALANCE_EPS))


def orthogonal(u: Array) -> Array:
    """Return roughly the nearest semi-orthogonal matrices to u (K, out, in).

    Five Newton-Schulz steps X ← (aI + bA + cA²)X with A = XXᵀ on X = u / ‖u‖, the shorter side
    first.
    """
    if u.shape[1] > u.shape[2]:
        return orthogonal(u.swapaxes(-1, -2)).swapaxes(-1, -2)
    norms = np.sqrt(np.einsum("kij,kij->k", u, u))
    x: Array = np.ascontiguousarray(u / (norms + 1e-7)[:, None, None])
    a, b = (np.empty((*x.shape[:2], x.shape[1]), x.dtype) for _ in range(2))
    diagonal = np.einsum("kii->ki", b)  # a view
    spare = np.empty_like(x)
    for _ in range(NS_STEPS):
        np.matmul(x, x.swapaxes(-1, -2), out=a)
        np.matmul(a, a, out=b)
        b *= NS_C
        a *= NS_B
        b += a
        diagonal += NS_A
        np.matmul(b, x, out=spare)
        x, spare = spare, x
    return x


def clip_scale(norm: float, max_norm: float) -> float:
    """Return the factor that limits the gradient's norm to `max_norm`; 0 turns clipping off."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
