"""The format `hf` for a model that is an Arcee: a folder for transformers and vLLM without code."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.numpy

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.exchange import arcee
from mlx_randygpt.exchange.exporters.hf import ends, generation
from mlx_randygpt.exchange.exporters.tokenizer import as_json, tokenizer_files
from mlx_randygpt.state import Params


def arcee_files(saved: Checkpoint) -> dict[str, bytes]:
    """Return the weights, settings and tokenizer of an Arcee as files."""
    return {
        "config.json": as_json(config(saved)),
        "generation_config.json": as_json(generation(saved)),
        "model.safetensors": safetensors.numpy.save(weights(saved, arcee.HF), {"format": "pt"}),
        **tokenizer_files(saved.tokenizer, saved.model),
    }


def config(saved: Checkpoint) -> dict[str, Any]:
    """Return config.json with the names of transformers."""
    model = saved.model
    return {
        "model_type": arcee.MODEL_TYPE,
        "architectures": ["ArceeForCausalLM"],
        "hidden_act": "relu2",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.block_size,
        "hidden_size": model.n_embd,
        "intermediate_size": 4 * model.n_embd,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_head,
        "head_dim": model.head_size,
        "rms_norm_eps": arcee.NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "rope_theta": model.rope_base,  # the name before transformers 5
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        **ends(saved),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def weights(saved: Checkpoint, program: int) -> Params:
    """Return the weights by their names in `program` (arcee.HF or arcee.GGUF), with gains of 1."""
    model, params = saved.model, saved.state.params
    tensors: Params = {}
    for ours, names in arcee.matrix_names(model.n_layer, program).items():
        parts = np.split(params[ours], len(names))
        if program == arcee.HF and len(parts) == 3:  # query and key, not value
            parts[:2] = [arcee.pairs_to_halves(part, model.n_head) for part in parts[:2]]
        tensors |= {n: np.ascontiguousarray(part) for n, part in zip(names, parts, strict=True)}
    ones = np.ones(model.n_embd, np.float32)
    return tensors | {norm: ones.copy() for norm, _ in arcee.norm_names(model.n_layer, program)}
