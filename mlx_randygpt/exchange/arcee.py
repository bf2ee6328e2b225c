"""Arcee, the published architecture that a model of the recipe `portable` is an instance of.

transformers, vLLM, SGLang and llama.cpp implement it: RMSNorm, rotary positions, squared ReLU and
no biases. Its norms have gains; ours are 1, or are folded into the matrices that follow.

Legend: C n_embd, H heads, D = C/H.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import Array

MODEL_TYPE = "arcee"
NORM_EPS = 1e-5  # of every RMSNorm
OUTSIDE = {  # our name -> that of transformers, that of llama.cpp
    "wte": ("model.embed_tokens", "token_embd"),
    "lm_head": ("lm_head", "output"),
}
LAYER = {  # of a block; c_attn holds three of them, one below the other
    "attn.c_attn": (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
    ),
    "attn.c_proj": (("self_attn.o_proj", "attn_output"),),
    "mlp.c_fc": (("mlp.up_proj", "ffn_up"),),
    "mlp.c_proj": (("mlp.down_proj", "ffn_down"),),
}
NORMS = {  # norm of a block -> the matrix that reads its output
    ("input_layernorm", "attn_norm"): "attn.c_attn",
    ("post_attention_layernorm", "ffn_norm"): "mlp.c_fc",
}
FINAL_NORM = ("model.norm", "output_norm")  # lm_head reads its output
HF, GGUF = 0, 1  # place of a program's name in the tables above


def find_misfit(model: ModelConfig) -> str:
    """Return the first property of the model that Arcee does not have, or "" if it is an Arcee."""
    misfits = {
        f"arch {model.arch}": model.arch != "gpt",
        "learned positions": model.position != "rope",
        "QK-norm": model.qk_norm,
        "token shift": model.token_shift,
        "no norm before the head": not model.final_norm,
        f"heads of odd width {model.head_size}": model.head_size % 2 == 1,
    }
    return next((name for name, misfit in misfits.items() if misfit), "")


def matrix_names(n_layer: int, program: int) -> dict[str, list[str]]:
    """Return our name of each matrix -> the names under which `program` (HF or GGUF) holds it."""
    prefix = ("model.layers", "blk")[program]
    names = {f"{ours}.weight": [f"{theirs[program]}.weight"] for ours, theirs in OUTSIDE.items()}
    for i in range(n_layer):
        for ours, parts in LAYER.items():
            names[f"h.{i}.{ours}.weight"] = [f"{prefix}.{i}.{p[program]}.weight" for p in parts]
    return names


def norm_names(n_layer: int, program: int) -> Iterator[tuple[str, str]]:
    """Yield each norm's name in `program`, and our name of the matrix that reads its output."""
    prefix = ("model.layers", "blk")[program]
    for i in range(n_layer):
        for theirs, ours in NORMS.items():
            yield f"{prefix}.{i}.{theirs[program]}.weight", f"h.{i}.{ours}.weight"
    yield f"{FINAL_NORM[program]}.weight", "lm_head.weight"


def pairs_to_halves(matrix: Array, n_head: int) -> Array:
    """Return the rows of a query or key matrix (C, C) in the order of transformers.

    Rotary positions turn neighbouring rows 2j and 2j + 1 of a head here and in llama.cpp, and rows
    j and j + D/2 in transformers.
    """
    heads = matrix.reshape(n_head, -1, 2, matrix.shape[1])  # (H, D/2, 2, C)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(matrix.shape)


def halves_to_pairs(matrix: Array, n_head: int) -> Array:
    """Return the rows of a query or key matrix (C, C) of transformers in our order."""
    heads = matrix.reshape(n_head, 2, -1, matrix.shape[1])  # (H, 2, D/2, C)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(matrix.shape)
