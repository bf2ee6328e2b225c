"""The page of `mlxgpt inspect`: the numbers of `insight` as JSON inside `inspect.html`."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.analysis import insight
from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.model import parameter_count
from mlx_randygpt.palette import PROBABILITIES, page_style
from mlx_randygpt.state import Array
from mlx_randygpt.tokenizers import NO_TOKEN, Tokenizer
from mlx_randygpt.words import unknown_line

MAX_TOKENS = 256  # compared; of a larger vocabulary the most frequent ones
MAX_SAMPLES = 12  # shown of a run
MAX_MAPS_BYTES = 3 << 20  # all attention maps together, one byte a probability
STYLE, MARK = "/*STYLE*/", "/*DATA*/null"  # where the page's colours and values go


def page(
    name: str,
    saved: Checkpoint,
    tokenizer: Tokenizer,
    val: Array,
    text: str | None,
    scored: insight.Losses,
    samples: Sequence[dict[str, Any]] = (),
) -> str:
    """Return the page as HTML.

    It shows the attention of `text`, by default of the beginning of the ids `val`, and the losses
    `scored` in it; `samples` are rows of step, prompt and text.
    """
    config, w = saved.model, saved.state.params
    labels = insight.token_texts(tokenizer)
    has_bos = tokenizer.eos != NO_TOKEN  # without EOS, BOS is an ordinary token
    ids = tokenizer.encode(text) if text else val[(val != tokenizer.bos) | (not has_bos)]
    max_length = int((MAX_MAPS_BYTES / (config.n_layer * config.n_head)) ** 0.5)
    ids = ids[: max(1, min(config.block_size, max_length))]
    logits, maps = insight.forward(w, config, ids[None])
    common = _common_tokens(val, tokenizer)
    values: dict[str, Any] = {
        "facts": _facts(name, saved, scored),
        "labels": [labels[i] for i in common],
        "near": insight.neighbours(w["wte.weight"], common),
        "plane": insight.plane(w["wte.weight"], common),
        "text": [labels[i] for i in ids],
        "layers": config.n_layer,
        "heads": config.n_head,
        "maps": [_encode_map(p) for layer in maps for p in layer[0]],
        "next": [[[labels[i], p] for i, p in row] for row in insight.candidates(logits[0])],
        "positions": insight.by_position(scored),
        "classes": insight.by_class(scored, labels),
        "passages": insight.passages(scored, labels),
        "limits": [limit for limit, _ in PROBABILITIES[:-1]],
        "samples": _select_samples(samples),
        "warnings": [line for line in (unknown_line(tokenizer.unknown(text or "")),) if line],
        "command": shlex.join(["mlxgpt", "sample", "--checkpoint", name]),
    }
    content = json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")
    template = Path(__file__).with_name("inspect.html").read_text(encoding="utf-8")
    return template.replace(STYLE, page_style(":root")).replace(MARK, content)


def _facts(name: str, saved: Checkpoint, scored: insight.Losses) -> list[tuple[str, str]]:
    m = saved.model
    size = f"{m.n_layer} layers × {m.n_head} heads × {m.n_embd}, context {m.block_size}"
    n = int(np.isfinite(scored.nats).sum())
    return [
        ("checkpoint", name),
        ("model", f"{parameter_count(m):,} parameters, {size}, {saved.train.recipe} recipe"),
        ("step", f"{saved.state.step:,}"),
        ("loss here", f"{np.nanmean(scored.nats):.4f} nats per token over {n:,} validation tokens"),
    ]


def _common_tokens(val: Array, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the tokens to compare, at most the `MAX_TOKENS` most frequent ones."""
    counts = np.bincount(val, minlength=tokenizer.vocab_size)
    if tokenizer.eos != NO_TOKEN:
        counts[[tokenizer.bos, tokenizer.eos]] = 0
    order = np.argsort(-counts, kind="stable")[:MAX_TOKENS]
    return sorted(int(i) for i in order if counts[i])


def _select_samples(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first, the last and some samples in between, denser at the beginning."""
    n = len(samples)
    at = np.geomspace(1, n, MAX_SAMPLES) if n > MAX_SAMPLES else np.arange(1, n + 1)
    return [samples[i - 1] for i in dict.fromkeys(at.round().astype(int).tolist())]


def _encode_map(p: Array) -> str:
    """Return probabilities as bytes in base64."""
    return base64.b64encode((p * 255).round().astype(np.uint8).tobytes()).decode()
