"""What a model has learned, in numbers: embeddings, attention, next tokens and losses.

The forward pass is that of training in NumPy.

Legend: B windows, T time, C n_embd, H heads, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_randygpt.backends.numpy.model import Chunk, head_weight
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.data.windows import Conversations, eval_batches
from mlx_randygpt.state import IGNORED, Array, Params
from mlx_randygpt.tokenizers import Tokenizer

N_NEAR, N_NEXT = 8, 10  # neighbours of a token, candidates for the next one
PASSAGE = 64  # tokens in a passage
N_PASSAGES = 5  # hardest, and easiest
MAX_NUMBERS = 1 << 22  # in the logits or an MLP at a time, 16 MB


def forward(w: Params, config: ModelConfig, tokens: Array) -> tuple[Array, list[Array]]:
    """Return logits (B, T, V) of tokens (B, T), and the attention of each layer, (B, H, Tq, Tk)."""
    b, t = tokens.shape
    chunk = inference_chunk(w, config, b, t)
    logits = chunk.forward(w, tokens, None) @ head_weight(w).T
    # The chunk has keys first, and leaves blocks of keys that no query sees unwritten.
    maps = [np.triu(layer.probs).swapaxes(-1, -2) for layer in chunk.layers]
    return logits.reshape(b, t, -1), maps


def inference_chunk(
    w: Params, config: ModelConfig, rows: int, block_size: int, *, recompute: bool = False
) -> Chunk:
    """Return the NumPy backend's chunk for forward passes alone; `recompute` keeps one layer."""
    no_grads: Array = np.empty(0, w["wte.weight"].dtype)
    return Chunk(config, rows, block_size, no_grads, {}, recompute=recompute)


def attention_map(w: Params, config: ModelConfig, tokens: Array, layer: int, head: int) -> Array:
    """Return how much each token of tokens (T,) attends to each, (T, T); rows sum to 1."""
    return np.asarray(forward(w, config, tokens[None])[1][layer][0, head])


@dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats of each target of some windows; nan if a target is ignored."""

    tokens: Array  # (n, T+1), the windows
    nats: Array  # (n, T)


def losses(
    w: Params,
    config: ModelConfig,
    tokens: Array,
    max_tokens: int,
    conversations: Conversations | None = None,
) -> Losses:
    """Return the loss of each token in evenly spread windows, about `max_tokens` in all.

    With `conversations`, their answers are predicted and nothing else.
    """
    widest = max(config.vocab_size, 4 * config.n_embd)
    per_batch = max(1, MAX_NUMBERS // (config.block_size * widest))
    chunk: Chunk | None = None
    windows, nats_of_batches = [], []
    batches = eval_batches(tokens, config.block_size, per_batch, max_tokens, conversations)
    for batch in batches:
        x, y = batch.x(), batch.y()
        if chunk is None or len(x) > chunk.rows:
            chunk = inference_chunk(w, config, *x.shape, recompute=True)
        logits = (chunk.forward(w, x, None) @ head_weight(w).T).reshape(*x.shape, -1)
        logits -= logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits).sum(axis=-1))
        picked = np.take_along_axis(logits, np.maximum(y, 0)[..., None], axis=-1)[..., 0]
        nats_of_batches.append(np.where(y == IGNORED, np.nan, total - picked))
        windows.append(np.concatenate([x, np.maximum(y[:, -1:], 0)], axis=1))
    nats = np.concatenate(nats_of_batches)
    has_targets = np.isfinite(nats).any(axis=1)
    return Losses(np.concatenate(windows)[has_targets], nats[has_targets])


def by_position(scored: Losses) -> list[float]:
    """Return the mean loss of the first, second, … prediction in a context."""
    return [float(x) for x in np.nanmean(scored.nats, axis=0)]


CLASSES = (
    "lower-case letter",
    "upper-case letter",
    "digit",
    "space",
    "line break",
    "punctuation",
    "other",
)


def character_class(text: str) -> str:
    """Return the class of a token: that of its first character, leading spaces skipped."""
    c = text.lstrip(" ")[:1] or text[:1]
    if c in ("", "\n"):
        return "line break" if c else "other"
    if c == " ":
        return "space"
    for name, fits in zip(CLASSES, (c.islower(), c.isupper(), c.isdigit()), strict=False):
        if fits:
            return name
    return "punctuation" if c.isascii() and c.isprintable() else "other"


def by_class(scored: Losses, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return mean loss and count of the targets of each class that occurs."""
    index = np.array([CLASSES.index(character_class(label)) for label in labels])
    counted = np.isfinite(scored.nats)
    kinds, nats = index[scored.tokens[:, 1:][counted]], scored.nats[counted]
    counts = np.bincount(kinds, minlength=len(CLASSES))
    sums = np.bincount(kinds, nats, len(CLASSES))
    return [
        {"name": name, "count": int(n), "loss": float(total / n)}
        for name, n, total in zip(CLASSES, counts, sums, strict=True)
        if n
    ]


def passages(scored: Losses, labels: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the passages of the highest and of the lowest mean loss, with the loss of each token.

    The first quarter of a context is skipped, since any text is hard to predict there.
    """
    t = scored.nats.shape[1]
    start, size = t // 4, min(PASSAGE, t - t // 4)
    part = scored.nats[:, start : start + size]
    complete = np.flatnonzero(np.isfinite(part).all(axis=1))
    order = complete[np.argsort(part[complete].mean(axis=1), kind="stable")]

    def describe(row: int) -> dict[str, Any]:
        texts = [labels[i] for i in scored.tokens[row, start + 1 : start + 1 + size]]
        nats = part[row].astype(float).round(2).tolist()
        return {"loss": float(part[row].mean()), "tokens": texts, "nats": nats}

    n = min(N_PASSAGES, len(order) // 2)
    return {
        "hardest": [describe(i) for i in order[::-1][:n]],
        "easiest": [describe(i) for i in order[:n]],
    }


def neighbours(wte: Array, ids: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Return for each of `ids` the others of them whose embeddings are nearest by cosine."""
    e = wte[list(ids)].astype(np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12)
    cosines = e @ e.T
    np.fill_diagonal(cosines, -2)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(N_NEAR, len(ids) - 1)]
    return [[(int(j), float(cosines[i, j])) for j in row] for i, row in enumerate(nearest)]


def plane(wte: Array, ids: Sequence[int]) -> list[list[float]]:
    """Return two coordinates of each embedding, normalised first: the widest spread (PCA)."""
    e = wte[list(ids)].astype(np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12)
    u, s, _ = np.linalg.svd(e - e.mean(axis=0), full_matrices=False)
    flat = np.zeros((len(ids), 2))
    flat[:, : min(2, len(s))] = (u * s)[:, :2]
    return [[float(x) for x in row] for row in flat / max(float(np.abs(flat).max()), 1e-12)]


def candidates(logits: Array, n: int = N_NEXT) -> Iterator[list[tuple[int, float]]]:
    """Yield the `n` likeliest tokens and their probabilities at each position of logits (T, V)."""
    for row in logits.astype(np.float64):
        p = np.exp(row - row.max())
        p /= p.sum()
        yield [(int(i), float(p[i])) for i in np.argsort(-p, kind="stable")[:n]]


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token; "" for those that have none."""
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
