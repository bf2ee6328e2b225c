"""The model computed one position, head and query at a time, in float64: slow and obvious.

Legend: B batch, T time, C n_embd, H heads, D = C/H, V vocab.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import IGNORED, Batch, Params

Array = Any
T = 16  # the context of the tests


def rms(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def rotate(x: Array, t: int, base: float) -> Array:
    """Rotate one head's vector (D,) by its position."""
    d = len(x)
    matrix = np.zeros((d, d))
    for j in range(0, d, 2):
        angle = t * base ** (-j / d)
        c, s = np.cos(angle), np.sin(angle)
        matrix[j : j + 2, j : j + 2] = [[c, -s], [s, c]]
    return matrix @ x


def shift(x: Array, config: ModelConfig) -> Array:
    """Return rows (T', C) with the first half of the row before, if the model shifts."""
    if not config.token_shift:
        return x
    half = x.shape[1] // 2
    return np.array([[*(x[t - 1] if t else 0 * x[0])[:half], *x[t][half:]] for t in range(len(x))])


def branch_input(w: Params, name: str, config: ModelConfig, x: Array) -> Array:
    """Return the input of a branch for the residual stream x (T', C)."""
    if config.arch == "gpt":
        return shift(rms(x), config)
    return rms(x - x.mean(-1, keepdims=True)) * w[name] + w.get(f"{name}.bias", 0)


def activate(config: ModelConfig, h: Array) -> Array:
    if config.activation == "relu2":
        return np.maximum(h, 0) ** 2
    if config.activation == "gelu":
        return h * np.vectorize(math.erfc)(-h / 2**0.5) / 2
    return 0.5 * h * (1 + np.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))


def naive_logits(
    w: Params,
    config: ModelConfig,
    tokens: Array,
    window: int = T,
    shares: dict[tuple[int, int, int], Array] | None = None,
) -> Array:
    """Return the logits (T', V) of one sequence.

    Every query sees the last `window` keys up to its own. `shares` is filled with the attention
    of (layer, head, query).
    """
    w = {name.removesuffix(".weight"): a.astype(np.float64) for name, a in w.items()}
    n, h, d = len(tokens), config.n_head, config.head_size
    x = w["wte"][tokens] + (w["wpe"][:n] if config.position == "learned" else 0)

    def times(name: str, x: Array) -> Array:
        return x @ w[name].T + w.get(f"{name}.bias", 0)

    for i in range(config.n_layer):
        qkv = times(f"h.{i}.attn.c_attn", branch_input(w, f"h.{i}.ln_1", config, x))
        qkv = qkv.reshape(n, 3, h, d)
        if config.qk_norm:
            qkv[:, :2] = rms(qkv[:, :2])
        if config.position == "rope":
            for t, part, head in np.ndindex(n, 2, h):
                qkv[t, part, head] = rotate(qkv[t, part, head], t, config.rope_base)
        y = np.zeros((n, h, d))
        for t, head in np.ndindex(n, h):
            seen = slice(max(0, t - window + 1), t + 1)
            e = np.exp(qkv[seen, 1, head] @ qkv[t, 0, head] / d**0.5)
            y[t, head] = e @ qkv[seen, 2, head] / e.sum()
            if shares is not None:
                shares[i, head, t] = e / e.sum()
        x = x + times(f"h.{i}.attn.c_proj", y.reshape(n, -1))
        hidden = times(f"h.{i}.mlp.c_fc", branch_input(w, f"h.{i}.ln_2", config, x))
        x = x + times(f"h.{i}.mlp.c_proj", activate(config, hidden))
    if config.final_norm:
        x = branch_input(w, "ln_f", replace(config, token_shift=False), x)
    return x @ w.get("lm_head", w["wte"]).T


def naive_loss(w: Params, config: ModelConfig, batch: Batch) -> float:
    nats = []
    for x, y in zip(batch.x(), batch.y(), strict=True):
        logits = naive_logits(w, config, x)
        nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, y[:, None], 1)[:, 0]
        nats += list(nll[y != IGNORED])
    return float(np.mean(nats))
