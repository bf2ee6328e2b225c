"""What a model has learned, in numbers: who is near whom, who attends to whom, what comes next,
and where it errs.

The forward pass here is a third one, whole windows at a time and every probability kept; it is
written for reading and tested against the backends. Knows nothing of files and pages.

Legend: B windows, T time, C n_embd, H heads, D = C/H, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_randygpt.backends.numpy.gpt2 import gelu, gelu_tanh
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.data.windows import eval_batches
from mlx_randygpt.state import IGNORED, Array, Params
from mlx_randygpt.tokenizers import Tokenizer

NORM_EPS, ROPE_BASE = 1e-5, 10000.0
N_NEAR, N_NEXT = 8, 10  # neighbours of a token, candidates for the next one
PASSAGE = 64  # tokens of a passage
N_PASSAGES = 5  # hardest, and easiest
LOGITS = 1 << 22  # numbers at a time, 16 MB


def forward(w: Params, config: ModelConfig, tokens: Array) -> tuple[Array, list[Array]]:
    """Logits (B, T, V) of tokens (B, T), and of each layer who attends to whom: (B, H, Tq, Tk)."""
    t = tokens.shape[1]
    x = w["wte.weight"][tokens]  # (B, T, C)
    if config.position == "learned":
        x = x + w["wpe.weight"][:t]
    maps = []
    for i in range(config.n_layer):
        layer = f"h.{i}."
        inputs = _read(w, f"{layer}ln_1", config, x)
        y, p = _attention(_product(w, f"{layer}attn.c_attn", inputs), config)
        maps.append(p)
        x = x + _product(w, f"{layer}attn.c_proj", y)
        h = _product(w, f"{layer}mlp.c_fc", _read(w, f"{layer}ln_2", config, x))  # (B, T, 4C)
        x = x + _product(w, f"{layer}mlp.c_proj", _activation(config, h))
    if config.final_norm:
        x = _read(w, "ln_f", replace(config, token_shift=False), x)
    return x @ w.get("lm_head.weight", w["wte.weight"]).T, maps


def attention_map(w: Params, config: ModelConfig, tokens: Array, layer: int, head: int) -> Array:
    """Row i: the shares of attention that token i of tokens (T,) gives to each, (T, T)."""
    return np.asarray(forward(w, config, tokens[None])[1][layer][0, head])


def _product(w: Params, name: str, x: Array) -> Array:
    return np.asarray(x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0))


def _activation(config: ModelConfig, h: Array) -> Array:
    if config.arch == "gpt":
        return np.asarray(np.maximum(h, 0) ** 2)
    a = np.empty_like(h)
    (gelu if config.activation == "gelu" else gelu_tanh)(h, a)
    return a


def _read(w: Params, name: str, config: ModelConfig, x: Array) -> Array:
    """What a block reads: the norm of x, its first half from the position before; GPT-2's norms
    take the mean out and have weights."""
    if config.is_gpt2:
        hat = _norm(x - x.mean(axis=-1, keepdims=True))
        return np.asarray(hat * w[f"{name}.weight"] + w.get(f"{name}.bias", 0))
    n = _norm(x)
    if config.token_shift:
        half = config.n_embd // 2
        n[:, 1:, :half], n[:, 0, :half] = n[:, :-1, :half].copy(), 0
    return n


def _attention(qkv: Array, config: ModelConfig) -> tuple[Array, Array]:
    b, t, _ = qkv.shape
    qkv = qkv.reshape(b, t, 3, config.n_head, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (B, H, T, D) each
    if config.qk_norm:
        q, k = _norm(q), _norm(k)
    if config.position == "rope":
        q, k = _turned(q), _turned(k)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(config.head_size, dtype=q.dtype)
    scores += np.triu(np.full((t, t), -np.inf, q.dtype), 1)  # no key after its query
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return (p @ v).transpose(0, 2, 1, 3).reshape(b, t, -1), p


def _turned(x: Array) -> Array:
    """Each pair of values of a head turned by its position; x (B, H, T, D)."""
    n = x.shape[-1] // 2
    angles = np.arange(x.shape[2])[:, None] * ROPE_BASE ** (-np.arange(n) / n)  # (T, n)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    even, odd, out = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2], x.copy()
    out[..., 0 : 2 * n : 2] = even * cos - odd * sin
    out[..., 1 : 2 * n : 2] = even * sin + odd * cos
    return out


def _norm(x: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + NORM_EPS))


@dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats of each target of some windows; nan where a window has none."""

    tokens: Array  # (n, T+1), the windows
    nats: Array  # (n, T)


def losses(w: Params, config: ModelConfig, tokens: Array, max_tokens: int) -> Losses:
    """The loss of each token of windows of a split, evenly spread, about `max_tokens` in all."""
    per_batch = max(1, LOGITS // (config.block_size * max(config.vocab_size, 4 * config.n_embd)))
    windows, found = [], []
    for batch in eval_batches(tokens, config.block_size, per_batch, max_tokens):
        x, y = batch.x(), batch.y()
        logits = forward(w, config, x)[0]
        logits -= logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits).sum(axis=-1))
        picked = np.take_along_axis(logits, np.maximum(y, 0)[..., None], axis=-1)[..., 0]
        found.append(np.where(y == IGNORED, np.nan, total - picked))
        windows.append(np.concatenate([x, np.maximum(y[:, -1:], 0)], axis=1))
    nats = np.concatenate(found)
    full = np.isfinite(nats).any(axis=1)
    return Losses(np.concatenate(windows)[full], nats[full])


def by_position(found: Losses) -> list[float]:
    """Mean loss of the first, second, … prediction in a context."""
    return [float(x) for x in np.nanmean(found.nats, axis=0)]


CLASSES = ("lower-case letter", "upper-case letter", "digit", "space", "line break", "punctuation",
           "other")  # fmt: skip


def character_class(text: str) -> str:
    """Of the first character that is not a space, for a token of several."""
    c = text.lstrip(" ")[:1] or text[:1]
    if c in ("", "\n"):
        return "line break" if c else "other"
    if c == " ":
        return "space"
    for name, fits in zip(CLASSES, (c.islower(), c.isupper(), c.isdigit()), strict=False):
        if fits:
            return name
    return "punctuation" if c.isascii() and c.isprintable() else "other"


def by_class(found: Losses, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Mean loss and count of the targets of each class that occurs."""
    index = np.array([CLASSES.index(character_class(label)) for label in labels])
    good = np.isfinite(found.nats)
    kinds, nats = index[found.tokens[:, 1:][good]], found.nats[good]
    counts = np.bincount(kinds, minlength=len(CLASSES))
    sums = np.bincount(kinds, nats, len(CLASSES))
    return [
        {"name": name, "count": int(n), "loss": float(total / n)}
        for name, n, total in zip(CLASSES, counts, sums, strict=True)
        if n
    ]


def passages(found: Losses, labels: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The stretches of the highest and of the lowest mean loss, with the loss of each token. The
    first quarter of a context is left out: there any text is hard."""
    t = found.nats.shape[1]
    start, size = t // 4, min(PASSAGE, t - t // 4)
    part = found.nats[:, start : start + size]
    whole = np.flatnonzero(np.isfinite(part).all(axis=1))
    order = whole[np.argsort(part[whole].mean(axis=1), kind="stable")]

    def told(row: int) -> dict[str, Any]:
        texts = [labels[i] for i in found.tokens[row, start + 1 : start + 1 + size]]
        nats = part[row].round(2).tolist()
        return {"loss": float(part[row].mean()), "tokens": texts, "nats": nats}

    n = min(N_PASSAGES, len(order) // 2)
    return {"hardest": [told(i) for i in order[::-1][:n]], "easiest": [told(i) for i in order[:n]]}


def neighbours(wte: Array, ids: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each of `ids` the nearest others among them by the cosine of their embeddings."""
    e = wte[list(ids)].astype(np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12)
    cosines = e @ e.T
    np.fill_diagonal(cosines, -2)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(N_NEAR, len(ids) - 1)]
    return [[(int(j), float(cosines[i, j])) for j in row] for i, row in enumerate(nearest)]


def plane(wte: Array, ids: Sequence[int]) -> list[list[float]]:
    """Two coordinates of each embedding, each of length one: those of the widest spread (PCA)."""
    e = wte[list(ids)].astype(np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12)
    u, s, _ = np.linalg.svd(e - e.mean(axis=0), full_matrices=False)
    flat = np.zeros((len(ids), 2))
    flat[:, : min(2, len(s))] = (u * s)[:, :2]
    return [[float(x) for x in row] for row in flat / max(float(np.abs(flat).max()), 1e-12)]


def candidates(logits: Array) -> Iterator[list[tuple[int, float]]]:
    """For each position of logits (T, V) the likeliest next tokens and their probabilities."""
    for row in logits.astype(np.float64):
        p = np.exp(row - row.max())
        p /= p.sum()
        yield [(int(i), float(p[i])) for i in np.argsort(-p, kind="stable")[:N_NEXT]]


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of each token; "" for those that have none."""
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
