"""What one head attends to: the forward pass once more, in plain NumPy, up to one layer.

Legend: T tokens, C n_embd, H heads, D = C/H.
"""

from __future__ import annotations

import numpy as np

from mlx_randygpt.backends.numpy_ops import NORM_EPS, rope_phases, rotate
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import Array, Params


def attention_map(w: Params, config: ModelConfig, tokens: Array, layer: int, head: int) -> Array:
    """Row i: the shares of attention that token i gives to the tokens up to itself, (T, T)."""
    x = w["wte.weight"][tokens]  # (T, C)
    if config.position == "learned":
        x = x + w["wpe.weight"][: len(tokens)]
    for i in range(layer):
        shares, v = _shares(w, config, x, i)  # (H, T, T), (H, T, D)
        y = (shares @ v).swapaxes(0, 1).reshape(x.shape)
        x = x + y @ w[f"h.{i}.attn.c_proj.weight"].T
        h = np.maximum(_read(config, x) @ w[f"h.{i}.mlp.c_fc.weight"].T, 0)  # (T, F)
        x = x + (h * h) @ w[f"h.{i}.mlp.c_proj.weight"].T
    return np.asarray(_shares(w, config, x, layer)[0][head])


def _shares(w: Params, config: ModelConfig, x: Array, layer: int) -> tuple[Array, Array]:
    """Attention of each head (H, T, T), and the values it is over (H, T, D)."""
    t, (h, d) = len(x), (config.n_head, config.head_size)
    qkv = _read(config, x) @ w[f"h.{layer}.attn.c_attn.weight"].T  # (T, 3C)
    q, k, v = qkv.reshape(t, 3, h, d).transpose(1, 2, 0, 3)  # (H, T, D) each
    if config.qk_norm:
        q, k = _norm(q), _norm(k)
    if config.position == "rope":
        phases = rope_phases(np.arange(t), d, 1, x.dtype.type)
        q, k = q.copy(), k.copy()
        rotate(q, phases)
        rotate(k, phases)
    scores = q @ k.swapaxes(-1, -2) * d**-0.5  # (H, T, T)
    scores = np.where(np.tri(t, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True), v


def _read(config: ModelConfig, x: Array) -> Array:
    """What a layer reads of the residual stream (T, C): normed, and under token shift its first
    half from the token before."""
    x = _norm(x)
    if config.token_shift:
        half = x.shape[1] // 2
        before = np.concatenate([np.zeros_like(x[:1, :half]), x[:-1, :half]])
        x = np.concatenate([before, x[:, half:]], axis=1)
    return x


def _norm(x: Array) -> Array:
    mean = (x * x).mean(axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean + NORM_EPS))
