"""Compare a model with its exports in other programs: greedy text, and the loss on a text.

    python benchmarks/exports.py runs/first/checkpoint.safetensors --data text.txt --prompt "ROMEO:"

It exports the checkpoint to a temporary folder and runs every program that is installed:
transformers (its pipeline and its loss), mlx-lm, and llama.cpp through xllamacpp.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt import load
from mlx_randygpt.checkpoint import Checkpoint, load_checkpoint
from mlx_randygpt.exchange.arcee import find_misfit
from mlx_randygpt.exchange.export import export
from mlx_randygpt.state import Batch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def text_of_transformers(folder: Path, prompt: str, n: int, trust: bool) -> str:
    """Return the greedy text of transformers' pipeline."""
    from transformers import pipeline

    write = pipeline("text-generation", model=str(folder), trust_remote_code=trust, device=-1)
    answer = write(prompt, max_new_tokens=n, do_sample=False, return_full_text=False)
    return str(answer[0]["generated_text"])


def text_of_mlx_lm(folder: Path, prompt: str, n: int, trust: bool) -> str:
    """Return the greedy text of mlx-lm."""
    from mlx_lm import generate
    from mlx_lm.utils import load as load_mlx_lm

    config = {"trust_remote_code": trust}
    model, tokenizer = load_mlx_lm(str(folder), tokenizer_config=config, trust_remote_code=trust)
    return str(generate(model, tokenizer, tokenizer.encode(prompt), max_tokens=n))


def text_of_llama_cpp(folder: Path, prompt: str, n: int, trust: bool) -> str:
    """Return the greedy text of llama.cpp, with a cache in float32 as ours."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    server = xllamacpp.Server(params)
    body = {"prompt": prompt, "max_tokens": n, "temperature": 0.0}
    return str(server.handle_completions(body)["choices"][0]["text"])


def loss_of_transformers(folder: Path, windows: Any, trust: bool) -> float:
    """Return the mean loss of transformers over token windows (N, T + 1)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    total = 0.0
    with torch.no_grad():
        for window in torch.tensor(windows, dtype=torch.int64).split(16):
            logits = model(window[:, :-1]).logits.flatten(0, 1)
            total += torch.nn.functional.cross_entropy(
                logits, window[:, 1:].flatten(), reduction="sum"
            ).item()
    return total / windows[:, 1:].size


def compare_losses(checkpoint: Path, saved: Checkpoint, data: Path, trust: bool) -> dict[str, Any]:
    """Return the loss of NumPy and of transformers on the same windows of a text."""
    model = load(checkpoint, backend="numpy")
    tokens = model.tokenizer.encode(data.read_text(encoding="utf-8"))
    size = saved.model.block_size
    n = min(128, (len(tokens) - 1) // size)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size + 1)[::size][:n]
    ours = model.backend.loss(Batch.of(windows))
    with tempfile.TemporaryDirectory() as work:
        export(saved, "hf", Path(work, "hf"))
        theirs = loss_of_transformers(Path(work, "hf"), windows, trust)
    return {"tokens": windows[:, 1:].size, "mlxgpt": ours, "transformers": theirs}


WRITERS: dict[str, tuple[str, Callable[..., str]]] = {  # module -> format, function
    "torch": ("hf", text_of_transformers),
    "mlx_lm": ("mlx-lm", text_of_mlx_lm),
    "xllamacpp": ("gguf", text_of_llama_cpp),
}


def main() -> None:
    """Print one line per program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", default="ROMEO:")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--data", type=Path, help="compare the loss on this text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    saved = load_checkpoint(args.checkpoint, weights_only=True)
    model = load(args.checkpoint, backend="numpy")
    ours = model.generate(args.prompt, max_tokens=args.tokens, temperature=0.0)
    print(f"mlxgpt: {ours!r}")
    rows: dict[str, Any] = {"mlxgpt": ours}
    published = saved.model.is_gpt2 or not find_misfit(saved.model)
    for module, (kind, write) in WRITERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{module}: not installed")
            continue
        trust = kind == "mlx-lm" or not published
        with tempfile.TemporaryDirectory() as work:
            export(saved, kind, Path(work, "x"))
            text = write(Path(work, "x"), args.prompt, args.tokens, trust)
        module = "transformers" if module == "torch" else module
        version = importlib.metadata.version(module.replace("_", "-"))
        verdict = "the same text" if text == ours else f"another text: {text!r}"
        print(f"{module} {version}: {verdict}")
        rows[module] = {"version": version, "text": text, "same": text == ours}
    if args.data and importlib.util.find_spec("torch"):
        losses = compare_losses(args.checkpoint, saved, args.data, not published)
        difference = abs(losses["mlxgpt"] - losses["transformers"])
        print(f"loss over {losses['tokens']:,} tokens: {losses}, difference {difference:.1e}")
        rows["loss"] = losses
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
