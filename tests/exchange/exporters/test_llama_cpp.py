"""Exported GGUF files in llama.cpp itself, as the package xllamacpp bundles it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import make, streamed

from mlx_randygpt.exchange.export import export
from mlx_randygpt.tokenizers import tokenizer_from_json

xllamacpp = pytest.importorskip("xllamacpp")

pytestmark = pytest.mark.slow
PROMPT = "ROMEO: é “日🙂”\n"
N = 200
BOUNDS = {
    "portable": 5e-5,
    "gpt2": 1e-2,
}  # measured 7e-6, and 1.6e-3: its GELU is a table in float16


def complete(path: Path, prompt: str, n: int) -> tuple[str, list[dict[str, Any]]]:
    """The greedy text of llama.cpp after `prompt`, and its tokens with their log-probabilities."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 512
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": n, "temperature": 0.0, "logprobs": 5}
    )
    choice = answer["choices"][0]
    return choice["text"], choice["logprobs"]["content"]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("recipe", ["portable", "gpt2"])
def test_llama_cpp_computes_the_same_tokens_and_log_probabilities(
    recipe: str,
    kind: str,
    text: str,
    tiny_model: Callable[..., Any],
    lively: Callable[..., Any],
    tmp_path: Path,
) -> None:
    saved = make(recipe, kind, text + PROMPT, tiny_model, lively, block_size=400)
    tokenizer = tokenizer_from_json(saved.tokenizer)
    head = "wte.weight" if saved.model.is_gpt2 else "lm_head.weight"
    for token in range(tokenizer.vocab_size):  # its answers leave out tokens of half a character
        if "\ufffd" in tokenizer.decode([token]) or token == tokenizer.eos:
            saved.state.params[head][token] = 0
    export(saved, "gguf", tmp_path / "x")
    _, tokens = complete(tmp_path / "x" / "model.gguf", PROMPT, N)
    prompt = tokenizer.encode(PROMPT)
    ids = np.append(prompt, [token["id"] for token in tokens]).astype(np.int32)
    logits = streamed(saved, ids)[len(prompt) - 1 : -1]  # (N, V)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    assert ids[len(prompt) :].tolist() == logits.argmax(axis=1).tolist()
    assert len(tokens) == N
    worst = max(
        abs(row[likely["id"]] - likely["logprob"])
        for row, token in zip(logprobs, tokens, strict=True)
        for likely in token["top_logprobs"]
    )
    assert worst < BOUNDS[recipe], worst


def test_llama_cpp_reads_a_vocabulary_without_merges(
    text: str,
    tiny_model: Callable[..., Any],
    lively: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exported.ODD", "")  # ASCII only
    saved = make("portable", "char", text, tiny_model, lively, block_size=400)
    export(saved, "gguf", tmp_path / "x")
    _, tokens = complete(tmp_path / "x" / "model.gguf", "The old ship", 1)
    prompt = tokenizer_from_json(saved.tokenizer).encode("The old ship")
    assert tokens[0]["id"] == streamed(saved, prompt)[-1].argmax()
