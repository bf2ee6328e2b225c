"""Checkpoints to export: models with lively weights, never trained, and what they write."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from mlx_randygpt.backends import make_backend
from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.dialogue import Turn
from mlx_randygpt.progress import Progress
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate
from mlx_randygpt.state import Array, Params, TrainState
from mlx_randygpt.tokenizers import Tokenizer, tokenizer_from_json
from mlx_randygpt.tokenizers.chars import CharTokenizer, FixedCharTokenizer
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

SIZES = {"n_embd": 64, "n_head": 4, "n_layer": 2, "block_size": 250}  # 64: a group of 4-bit weights
BPE_SIZE = 300
LITERAL = ("<|end|>", "<|user|>", "<|assistant|>", "<eos>", "<bos>", "<unk>", "<", "<<|end|>", "|>")
PIECES = ("The old ship", " ", "  ", "\n\n", "\t", "é", "“", "日", "🙂", "e\u0301", "{{ 1 }}", "'s")
PIECES += ("{% if %}", '"', "\\n", "\r", "\x00", "\ufeff", "12", "\u200d", "a", "\n")
ODD = "\x00\t\n\r \x1b é🙂\u0301日\ufeff<>"


def make(
    recipe: str,
    kind: str,
    text: str,
    tiny_model: Callable[..., ModelConfig],
    lively: Callable[..., Params],
    dialogue: bool = False,
    **changes: Any,
) -> Checkpoint:
    """A checkpoint of a small model with a tokenizer of this kind learned from `text`."""
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer.train(text + ODD)
    elif kind == "table":  # nothing begins or ends a text, one id stands for no character
        tokenizer = FixedCharTokenizer(("", *sorted(set(text + ODD + "\\]^-"), reverse=True)))
    else:
        tokenizer = SubwordTokenizer.train(kind, [text + ODD], BPE_SIZE if kind == "bpe" else 600)
    tokenizer = tokenizer.with_dialogue() if dialogue else tokenizer
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size} | changes
    model = tiny_model(recipe, **sizes)
    weights = lively(model)
    head = "wte.weight" if model.is_gpt2 else "lm_head.weight"
    weights[head][list(tokenizer.never_sampled())] = 0  # others have no rule for these
    state = TrainState(7, weights, {"m": lively(model, 2), "v": {}})
    data = {"paths": ["/home/me/my notes.txt"], "characters": len(text), "sha256": "ab" * 32}
    train = TrainConfig(recipe=recipe if recipe != "gpt2" else "classic", seed=42, threads=2)
    progress = Progress(tokens=1234, best_loss=1.25, best_step=5, val_loss=1.5, eval_step=7)
    return Checkpoint(model, train, progress, tokenizer.to_json(), data, "numpy", state)


def streamed(saved: Checkpoint, ids: Array) -> Array:
    """Logits after each token as our NumPy backend gives them, token by token, (T, V). Learned
    positions begin again after every window."""
    backend = make_backend("numpy", saved.model, saved.train, saved.state)
    cache, rows = backend.new_cache(1), []
    for n, token in enumerate(ids):
        if saved.model.position == "learned" and n % saved.model.block_size == 0:
            cache.reset(slice(0, 1))
        rows.append(backend.logits(np.array([[token]], np.int32), cache, slice(0, 1))[0])
    return np.array(rows)


def windows(saved: Checkpoint, ids: Array) -> list[Array]:
    """`ids` as a model can read them at once: all, or for learned positions window by window."""
    size = saved.model.block_size if saved.model.position == "learned" else len(ids)
    return [ids[at : at + size] for at in range(0, len(ids), size)]


def greedy(saved: Checkpoint, prompt: Array, n: int) -> list[int]:
    """The n likeliest tokens after the prompt, one by one, by our NumPy backend."""
    backend = make_backend("numpy", saved.model, saved.train, saved.state)
    tokenizer = tokenizer_from_json(saved.tokenizer)
    config = SampleConfig(max_tokens=n, temperature=0.0)
    for samples in generate(backend, saved.model, tokenizer, prompt.tolist(), config):
        found = samples[0].ids
    return found


def conversations(n: int) -> list[list[Turn]]:
    """Conversations of odd texts, the same each time, some of which look like special tokens."""
    draw, found = Random(3), []
    for _ in range(n):
        roles = ["system"] * (draw.random() < 0.4) + ["user", "assistant"] * draw.randint(1, 4)
        texts = ("".join(_odd_words(draw)) for _ in roles)
        found.append([Turn(role, words) for role, words in zip(roles, texts, strict=True)])
    return found


def _odd_words(draw: Random) -> list[str]:
    return [
        draw.choice(LITERAL if draw.random() < 0.3 else PIECES) for _ in range(draw.randrange(8))
    ]


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Turns as other programs take them."""
    return [{"role": turn.role, "content": turn.text} for turn in turns]
