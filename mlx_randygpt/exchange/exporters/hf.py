"""The formats `hf` and `mlx-lm`: one folder that transformers and mlx-lm both run.

The architecture is our own, so the folder contains its code: `mlx_model.py`, the file that the MLX
backend computes with, one beside it that mlx-lm loads, and the same model in PyTorch.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.numpy

from mlx_randygpt import backends
from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.exchange.exporters.tokenizer import as_json, tokenizer_files
from mlx_randygpt.tokenizers import NO_TOKEN, stops, tokenizer_from_json

SHIPPED = Path(__file__).parent.parent / "shipped"


def native_files(saved: Checkpoint) -> dict[str, bytes]:
    """Return weights, settings, tokenizer and code of a model of our own architecture."""
    sources = {path.name: path for path in SHIPPED.iterdir() if path.suffix == ".py"}
    sources["mlx_model.py"] = Path(backends.__file__).parent / "mlx" / "model.py"
    return {
        "config.json": as_json(config(saved)),
        "generation_config.json": as_json(generation(saved)),
        "model.safetensors": safetensors.numpy.save(saved.state.params, {"format": "pt"}),
        **tokenizer_files(saved.tokenizer, saved.model),
        **{name: path.read_bytes() for name, path in sorted(sources.items())},
    }


def config(saved: Checkpoint) -> dict[str, Any]:
    """Return config.json; its names are the fields of ModelConfig."""
    return {
        "model_type": "mlxgpt",
        "architectures": ["MLXGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mlxgpt.MLXGPTConfig",
            "AutoModelForCausalLM": "modeling_mlxgpt.MLXGPTForCausalLM",
        },
        "model_file": "mlx_lm_model.py",
        **asdict(saved.model),
        **ends(saved),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def generation(saved: Checkpoint) -> dict[str, Any]:
    """Return generation_config.json: the tokens that end a text and those never sampled."""
    tokenizer = tokenizer_from_json(saved.tokenizer)
    padding, never = next(iter(stops(tokenizer)), None), list(tokenizer.never_sampled())
    settings = {**ends(saved), "pad_token_id": padding}
    return {**settings, "suppress_tokens": never} if never else settings


def ends(saved: Checkpoint) -> dict[str, int | list[int] | None]:
    """Return the id before a document and those after one and after a turn, or None."""
    tokenizer = tokenizer_from_json(saved.tokenizer)
    bos = None if tokenizer.eos == NO_TOKEN else tokenizer.bos
    after = list(stops(tokenizer))  # None overrides the default of GPT-2
    return {"bos_token_id": bos, "eos_token_id": after if after[1:] else next(iter(after), None)}
