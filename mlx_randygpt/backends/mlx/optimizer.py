"""One optimizer step in MLX over flat dicts of weights: clipping, AdamW, Muon.

Pure functions from old arrays to new ones, so that a whole step compiles and a failed one
changes nothing. Knows nothing of the model beyond the names of its weights.

Legend: weights are (out, in); P matrices stacked in one weight, R rows, K columns of each.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_randygpt.config import TrainConfig
from mlx_randygpt.model import muon_parts

Weights = dict[str, mx.array]
Moments = dict[str, Weights]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def uses_muon(name: str, optimizer: str) -> bool:
    """Whether Muon updates this weight; AdamW does the others."""
    return optimizer == "muon" and muon_parts(name) > 0


def rates(train: TrainConfig, step: int, lr: float) -> mx.array:
    """What changes with each step, as one array (3,), so that nothing is traced again:
    lr and the bias corrections 1 - beta^t of both moments, t = step + 1."""
    return mx.array([lr, 1 - train.beta1 ** (step + 1), 1 - train.beta2 ** (step + 1)])


def update(
    train: TrainConfig, weights: Weights, moments: Moments, grads: Weights, rates: mx.array
) -> tuple[Weights, Moments, mx.array]:
    """New weights, new moments and the norm of the gradient before clipping; where that is not
    finite, the old weights and moments."""
    grads, norm = clip(grads, train.grad_clip)
    matrices = {name: w for name, w in weights.items() if uses_muon(name, train.optimizer)}
    new, m = muon(train, matrices, moments["m"], grads, rates[0])
    v = {}
    lr = rates[0] * (train.adamw_lr_ratio if train.optimizer == "muon" else 1.0)
    for name in (name for name in weights if name not in matrices):
        old = (weights[name], moments["m"][name], moments["v"][name])
        new[name], m[name], v[name] = adamw(train, *old, grads[name], lr, rates[1:])
    finite = mx.isfinite(norm)

    def chosen(old: Weights, new: Weights) -> Weights:
        return {name: mx.where(finite, new[name], old[name]) for name in old}

    moved = {"m": chosen(moments["m"], m), "v": chosen(moments["v"], v)}
    return chosen(weights, new), moved, norm


def clip(grads: Weights, largest: float) -> tuple[Weights, mx.array]:
    """Gradients scaled down to a global norm of `largest` (0: as they are), and their norm."""
    norm = mx.sqrt(sum(mx.square(g).sum() for g in grads.values()))
    scale = mx.minimum(1.0, (largest or float("inf")) / (norm + 1e-6))
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
    """New (w, m, v) of one weight; decay is decoupled and for matrices only (arXiv 1711.05101)."""
    m = train.beta1 * m + (1 - train.beta1) * g
    v = train.beta2 * v + (1 - train.beta2) * mx.square(g)
    change = (m / corrections[0]) / (mx.sqrt(v / corrections[1]) + train.adam_eps)
    decay = train.weight_decay if w.ndim >= 2 else 0.0
    return w - lr * (change + decay * w), m, v


def muon(
    train: TrainConfig, weights: Weights, m: Weights, grads: Weights, lr: mx.array
) -> tuple[Weights, Weights]:
    """New weights and momenta of these: w -= lr (sqrt(max(1, R/K)) ortho(u) + decay w), with u
    the Nesterov momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""
    mu, dtype = train.momentum, getattr(mx, train.dtype)
    m = {name: mu * m[name] + (1 - mu) * grads[name] for name in weights}
    nesterov = {name: (1 - mu) * grads[name] + mu * m[name] for name in weights}
    ortho = orthogonalize(nesterov, dtype)
    new = {}
    for name, w in weights.items():
        rows = w.shape[0] // muon_parts(name)
        change = max(1.0, rows / w.shape[1]) ** 0.5 * ortho[name]
        new[name] = w - lr * (change + train.weight_decay * w)
    return new, m


def orthogonalize(updates: Weights, dtype: mx.Dtype) -> Weights:
    """Each stacked matrix with its singular values near 1, by products in `dtype`; one batch per
    shape, over all layers."""
    groups: dict[tuple[int, int], Weights] = {}
    for name, u in updates.items():
        x = u.reshape(muon_parts(name), -1, u.shape[1])  # (P, R, K)
        x = x.swapaxes(1, 2) if x.shape[1] > x.shape[2] else x  # R <= K from here
        groups.setdefault(x.shape[1:], {})[name] = x
    ortho = {}
    for group in groups.values():
        stacked = newton_schulz(mx.concatenate(list(group.values())), dtype)  # (sum of P, R, K)
        at = 0
        for name, x in group.items():
            y = stacked[at : at + len(x)]  # (P, R, K)
            at += len(x)
            flipped = updates[name].shape[1] != y.shape[2]
            ortho[name] = (y.swapaxes(1, 2) if flipped else y).reshape(updates[name].shape)
    return ortho


def newton_schulz(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Matrices (N, R, K), R <= K, to about U V^T of their singular value decompositions."""
    a, b, c = NEWTON_SCHULZ
    frobenius = mx.sqrt(mx.square(x).sum(axis=(1, 2), keepdims=True))  # (N, 1, 1)
    x = (x / (frobenius + 1e-7)).astype(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.swapaxes(1, 2)  # (N, R, R)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
