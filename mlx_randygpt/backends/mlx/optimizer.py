"""One optimizer step in MLX over stacks of weights: clipping, AdamW, Muon.

Pure functions from old arrays to new ones, so that a whole step compiles and a failed one
changes nothing.

Legend: N matrices in a stack, R rows, K columns of each, R <= K; weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import mlx.core as mx

from mlx_randygpt.backends.mlx.stacks import VECTORS, Stacks, Weights
from mlx_randygpt.config import TrainConfig

Moments = dict[str, Weights]
Rates = tuple[mx.array, mx.array, mx.array]
WeightAndMoments = tuple[mx.array, mx.array, Any]  # w, m, v; v is None if Muon has none
Keep = Callable[[mx.array, mx.array], mx.array]  # (new, old) -> new if the step is finite, else old

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
BALANCE_EPS = 1e-10


def rates(train: TrainConfig, step: int, lr: float) -> Rates:
    """Return lr and the bias corrections 1 - beta^t of both moments, t = step + 1.

    They change with each step; as arrays they cause no new trace.
    """
    numbers = lr, 1 - train.beta1 ** (step + 1), 1 - train.beta2 ** (step + 1)
    return tuple(mx.array(number) for number in numbers)


def update(
    train: TrainConfig,
    stacks: Stacks,
    weights: Weights,
    moments: Moments,
    grads: Weights,
    rates: Rates,
) -> tuple[Weights, Moments, mx.array]:
    """Return new weights, new moments and the norm of the gradient before clipping.

    If the norm is not finite, these are the old weights and moments. That is decided within each
    formula: outside, every array would have two readers, and nothing could be fused.
    """
    norm = mx.sqrt(sum(sum_of_squares(g) for g in grads.values()))
    clipping = mx.minimum(1.0, (train.grad_clip or float("inf")) / (norm + 1e-6))
    is_finite = mx.isfinite(norm)

    def keep(new: mx.array, old: mx.array) -> mx.array:
        return mx.where(is_finite, new, old)

    changed = {}
    for stack, w in weights.items():
        old = w, moments["m"][stack], moments["v"].get(stack)
        g = grads[stack] * clipping
        if w.ndim == 3:
            changed[stack] = muon(train, stacks.scale(stack), old, g, rates[0], keep)
        else:
            decay = 0.0 if stack == VECTORS else train.weight_decay
            changed[stack] = adamw(train, decay, old, g, rates, keep)
    new, m, v = ({stack: three[i] for stack, three in changed.items()} for i in range(3))
    return new, {"m": m, "v": {stack: v[stack] for stack in moments["v"]}}, norm


def sum_of_squares(g: mx.array) -> mx.array:
    """Return the sum of g², by rows: a million float32 terms in turn would lose four digits."""
    squares = mx.square(g)
    if g.ndim > 1:
        return squares.sum(axis=-1).sum()
    width = isqrt(g.size)
    square, rest = squares[: width * width], squares[width * width :]
    return square.reshape(width, width).sum(axis=1).sum() + rest.sum()


def adamw(
    train: TrainConfig, decay: float, old: WeightAndMoments, g: mx.array, rates: Rates, keep: Keep
) -> WeightAndMoments:
    """Return new weights and moments of a vector; the decay is decoupled (arXiv 1711.05101)."""
    (w, m, v), (lr, *corrections) = old, rates
    lr = lr * (train.adamw_lr_ratio if train.optimizer == "muon" else 1.0)
    m = keep(train.beta1 * m + (1 - train.beta1) * g, m)
    v = keep(train.beta2 * v + (1 - train.beta2) * mx.square(g), v)
    change = (m / corrections[0]) / (mx.sqrt(v / corrections[1]) + train.adam_eps)
    return keep(w - lr * (change + decay * w), w), m, v


def muon(
    train: TrainConfig,
    scale: mx.array,
    old: WeightAndMoments,
    g: mx.array,
    lr: mx.array,
    keep: Keep,
) -> WeightAndMoments:
    """Return new weights, momenta and mean squares: w -= lr (scale ortho(u) + decay w).

    u is the Nesterov momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon). With
    `muon_beta2` above 0 the rows of ortho(u) are brought to one size; see `balance`.
    """
    w, m, v = old
    mu = train.momentum
    m = keep(mu * m + (1 - mu) * g, m)
    change = newton_schulz((1 - mu) * g + mu * m, getattr(mx, train.dtype))
    if v is not None:
        change, mean_squares = balance(change, v, train.muon_beta2)
        v = keep(mean_squares, v)
    return keep(w - lr * (scale * change + train.weight_decay * w), w), m, v


def balance(u: mx.array, v: mx.array, beta2: float) -> tuple[mx.array, mx.array]:
    """Divide each neuron of u (N, R, K) by the root of its running mean square v; return both.

    v is (N, R, 1), of rows, or (N, 1, K), of columns. Each matrix keeps its norm, so that a common
    factor of v cancels and no bias needs correcting (NorMuon, Li et al. 2025, arXiv:2510.05491).
    """
    mean = mx.square(u).mean(axis=v.shape.index(1, 1), keepdims=True)  # as v
    v = beta2 * v + (1 - beta2) * mean
    scale = 1 / (mx.sqrt(v) + BALANCE_EPS)
    norms = [
        mx.sqrt(squares.sum(axis=(1, 2), keepdims=True))  # (N, 1, 1)
        for squares in (mean, mean * mx.square(scale))
    ]
    return u * (scale * (norms[0] / (norms[1] + BALANCE_EPS))), v


def newton_schulz(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Map matrices (N, R, K) to about U V^T of their singular value decompositions.

    The products are in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    frobenius = mx.sqrt(mx.square(x).sum(axis=(1, 2), keepdims=True))  # (N, 1, 1)
    x = (x / (frobenius + 1e-7)).astype(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.swapaxes(1, 2)  # (N, R, R)
        polynomial = mx.addmm(gram, gram, gram, alpha=c, beta=b)
        x = mx.addmm(x, polynomial, x, beta=a)
    return x
