"""The formats `hf` and `mlx-lm` for a GPT-2, which both libraries support without extra code.

Their files store the matrices of attention and MLP as (in, out), under the same names as ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import safetensors.numpy

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.exporters.hf import ends, generation
from mlx_randygpt.exchange.exporters.tokenizer import as_json, tokenizer_files
from mlx_randygpt.model import GPT2_NORM_EPS, Role, in_out_names, parameters
from mlx_randygpt.state import Params

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}  # ours -> that of transformers


def gpt2_files(saved: Checkpoint, kind: str) -> dict[str, bytes]:
    """Return the weights, settings and tokenizer of a GPT-2 as files."""
    if kind == "mlx-lm" and saved.model.activation != "gelu_tanh":
        raise ExchangeError(
            f"--format mlx-lm: the GPT-2 of mlx-lm has the tanh GELU only, this model has "
            f"activation {saved.model.activation!r}; use --format hf"
        )
    transposed = in_out_names(saved.model)
    weights = {
        name: np.ascontiguousarray(array.T) if name in transposed else array
        for name, array in with_biases(saved).items()
    }
    return {
        "config.json": as_json(config(saved)),
        "generation_config.json": as_json(generation(saved)),
        "model.safetensors": safetensors.numpy.save(weights, {"format": "pt"}),
        **tokenizer_files(saved.tokenizer, saved.model),
    }


def config(saved: Checkpoint) -> dict[str, Any]:
    """Return config.json with the names of transformers."""
    model = saved.model
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": ACTIVATIONS[model.activation],
        "vocab_size": model.vocab_size,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "layer_norm_epsilon": GPT2_NORM_EPS,
        "resid_pdrop": model.dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **ends(saved),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def with_biases(saved: Checkpoint) -> Params:
    """Return the weights, with zero biases if the model has none; the format needs them."""
    weights = parameters(replace(saved.model, bias=True))
    vectors = [weight for weight in weights if weight.role in (Role.GAIN, Role.BIAS)]
    return {v.name: np.zeros(v.shape, np.float32) for v in vectors} | saved.state.params
