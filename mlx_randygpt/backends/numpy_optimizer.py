"""AdamW and Muon in NumPy, in place, on slices of one flat vector per quantity.

The arithmetic is that of the MLX backend, line for line; `check` compares the two.
"""

from __future__ import annotations

import numpy as np

from mlx_randygpt.config import TrainConfig
from mlx_randygpt.state import Array

BLOCK = 1 << 15  # numbers per pass: five float32 vectors of this length stay in a core's L2
NS_STEPS = 5
NS_A, NS_B, NS_C = 3.4445, -4.7750, 2.0315


def adamw(
    w: Array, g: Array, m: Array, v: Array, *, t: int, lr: float, decay: float, config: TrainConfig
) -> None:
    """One AdamW step on equally long vectors (Loshchilov & Hutter 2019, arXiv:1711.05101).

    m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; w ← w − lr·(m̂ / (√v̂ + eps) + decay·w), with the
    hats dividing by 1−βᵗ; t counts from 1.
    """
    b1, b2 = config.beta1, config.beta2
    for start in range(0, len(w), BLOCK):
        block = slice(start, start + BLOCK)
        wb, gb, mb, vb = w[block], g[block], m[block], v[block]
        mb *= b1
        mb += (1 - b1) * gb
        vb *= b2
        vb += (1 - b2) * gb * gb
        step = vb / (1 - b2**t)
        np.sqrt(step, out=step)
        step += config.adam_eps
        np.divide(mb, step, out=step)
        step *= lr / (1 - b1**t)
        wb *= 1 - lr * decay
        wb -= step


def muon(w: Array, g: Array, m: Array, *, lr: float, decay: float, momentum: float) -> None:
    """One Muon step on one matrix (out, in) (Jordan et al. 2024, github.com/KellerJordan/Muon).

    m ← μm + (1−μ)g; u = (1−μ)g + μm; w ← w − lr·(√max(1, out/in)·orthogonal(u) + decay·w).
    """
    m *= momentum
    m += (1 - momentum) * g
    update = orthogonal((1 - momentum) * g + momentum * m)
    update *= lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
    w *= 1 - lr * decay
    w -= update


def orthogonal(u: Array) -> Array:
    """The nearest semi-orthogonal matrix to u, roughly: five Newton-Schulz steps
    X ← aX + (bA + cA²)X with A = XXᵀ on X = u / ‖u‖, the shorter side first."""
    wide = u if u.shape[0] <= u.shape[1] else u.T
    x: Array = np.ascontiguousarray(wide) / (np.linalg.norm(u) + 1e-7)
    for _ in range(NS_STEPS):
        a = x @ x.T  # (rows, rows)
        b = NS_C * (a @ a)
        a *= NS_B
        b += a
        next_x = b @ x
        x *= NS_A
        next_x += x
        x = next_x
    return x if wide is u else x.T


def clip_scale(norm: float, largest: float) -> float:
    """What the gradient is multiplied by so that its norm is at most `largest`; 0 clips nothing."""
    return min(1.0, largest / (norm + 1e-6)) if largest > 0 else 1.0
