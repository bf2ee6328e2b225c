"""One optimizer step in MLX over flat dicts of weights: clipping, AdamW, Muon.

Pure functions from old arrays to new ones, so that a whole step compiles and a failed one
changes nothing. `muon` maps the names of the weights that Muon updates to their P; AdamW updates
the others.

Legend: weights are (out, in); P matrices stacked in one weight, R rows, K columns of each.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlx_randygpt.config import TrainConfig

Weights = dict[str, mx.array]
Moments = dict[str, Weights]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
BALANCE_EPS = 1e-10


def rates(train: TrainConfig, step: int, lr: float) -> mx.array:
    """Return lr and the bias corrections 1 - beta^t of both moments, t = step + 1, (3,).

    They change with each step; in an array they cause no new trace.
    """
    return mx.array([lr, 1 - train.beta1 ** (step + 1), 1 - train.beta2 ** (step + 1)])


def update(
    train: TrainConfig,
    muon: Mapping[str, int],
    weights: Weights,
    moments: Moments,
    grads: Weights,
    rates: mx.array,
) -> tuple[Weights, Moments, mx.array]:
    """Return new weights, new moments and the norm of the gradient before clipping.

    If the norm is not finite, these are the old weights and moments.
    """
    grads, norm = clip(grads, train.grad_clip)
    matrices = {name: w for name, w in weights.items() if name in muon}
    new, m, v = muon_step(train, muon, matrices, moments, grads, rates[0])
    lr = rates[0] * (train.adamw_lr_ratio if train.optimizer == "muon" else 1.0)
    for name in (name for name in weights if name not in matrices):
        old = (weights[name], moments["m"][name], moments["v"][name])
        new[name], m[name], v[name] = adamw(train, *old, grads[name], lr, rates[1:])
    finite = mx.isfinite(norm)

    def accepted(old: Weights, new: Weights) -> Weights:
        return {name: mx.where(finite, new[name], old[name]) for name in old}

    new_moments = {"m": accepted(moments["m"], m), "v": accepted(moments["v"], v)}
    return accepted(weights, new), new_moments, norm


def clip(grads: Weights, max_norm: float) -> tuple[Weights, mx.array]:
    """Scale gradients down to a global norm of `max_norm` (0: no limit); return their old norm."""
    norm = mx.sqrt(sum(mx.square(g).sum() for g in grads.values()))
    scale = mx.minimum(1.0, (max_norm or float("inf")) / (norm + 1e-6))
    return {name: g * scale for name, g in grads.items()}, norm


def adamw(
    train: TrainConfig,
    w: mx.array,
    m: mx.array,
    v: mx.array,
    g: mx.array,
    lr: mx.array,
    corrections: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return new (w, m, v) of one weight.

    Decay is decoupled (arXiv 1711.05101) and applies to matrices only.
    """
    m = train.beta1 * m + (1 - train.beta1) * g
    v = train.beta2 * v + (1 - train.beta2) * mx.square(g)
    change = (m / corrections[0]) / (mx.sqrt(v / corrections[1]) + train.adam_eps)
    decay = train.weight_decay if w.ndim >= 2 else 0.0
    return w - lr * (change + decay * w), m, v


def muon_step(
    train: TrainConfig,
    muon: Mapping[str, int],
    weights: Weights,
    moments: Moments,
    grads: Weights,
    lr: mx.array,
) -> tuple[Weights, Weights, Weights]:
    """Return new weights, momenta and mean squares: w -= lr (sqrt(max(1, R/K)) ortho(u) + decay w).

    u is the Nesterov momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon). With
    `muon_beta2` above 0 the rows of ortho(u) are brought to one size; see `balance`.
    """
    mu, dtype = train.momentum, getattr(mx, train.dtype)
    m = {name: mu * moments["m"][name] + (1 - mu) * grads[name] for name in weights}
    nesterov = {name: (1 - mu) * grads[name] + mu * m[name] for name in weights}
    ortho = orthogonalize(nesterov, muon, dtype)
    new, v = {}, {}
    for name, w in weights.items():
        change = ortho[name]
        if train.muon_beta2 > 0:
            change, v[name] = balance(change, moments["v"][name], muon[name], train.muon_beta2)
        rows = w.shape[0] // muon[name]
        change = max(1.0, rows / w.shape[1]) ** 0.5 * change
        new[name] = w - lr * (change + train.weight_decay * w)
    return new, m, v


def balance(u: mx.array, v: mx.array, stacked: int, beta2: float) -> tuple[mx.array, mx.array]:
    """Divide each row of u by the root of its running mean square v; return both.

    v (out, 1) is of rows or, of a matrix wider than high, v (1, in) of columns. Each stacked matrix
    keeps its norm, so that a common factor of v cancels and no bias needs correcting (NorMuon,
    Li et al. 2025, arXiv:2510.05491).
    """
    mean = mx.square(u).mean(axis=v.shape.index(1), keepdims=True)  # as v
    v = beta2 * v + (1 - beta2) * mean
    scale = 1 / (mx.sqrt(v) + BALANCE_EPS)
    norms = [
        mx.sqrt(squares.reshape(stacked, -1).sum(axis=1, keepdims=True))  # (P, 1)
        for squares in (mean, mean * mx.square(scale))
    ]
    scale = scale.reshape(stacked, -1) * (norms[0] / (norms[1] + BALANCE_EPS))
    return u * scale.reshape(v.shape), v


def orthogonalize(updates: Weights, stacked: Mapping[str, int], dtype: mx.Dtype) -> Weights:
    """Bring the singular values of each stacked matrix near 1, by products in `dtype`.

    Matrices of one shape make one batch, over all layers.
    """
    groups: dict[tuple[int, int], Weights] = {}
    for name, u in updates.items():
        x = u.reshape(stacked[name], -1, u.shape[1])  # (P, R, K)
        x = x.swapaxes(1, 2) if x.shape[1] > x.shape[2] else x  # R <= K from here
        groups.setdefault(x.shape[1:], {})[name] = x
    ortho = {}
    for group in groups.values():
        batch = newton_schulz(mx.concatenate(list(group.values())), dtype)  # (sum of P, R, K)
        at = 0
        for name, x in group.items():
            y = batch[at : at + len(x)]  # (P, R, K)
            at += len(x)
            transposed = updates[name].shape[1] != y.shape[2]
            ortho[name] = (y.swapaxes(1, 2) if transposed else y).reshape(updates[name].shape)
    return ortho


def newton_schulz(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Map matrices (N, R, K), R <= K, to about U V^T of their singular value decompositions."""
    a, b, c = NEWTON_SCHULZ
    frobenius = mx.sqrt(mx.square(x).sum(axis=(1, 2), keepdims=True))  # (N, 1, 1)
    x = (x / (frobenius + 1e-7)).astype(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.swapaxes(1, 2)  # (N, R, R)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
