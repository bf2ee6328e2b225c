"""Import an Arcee model from a Hugging Face folder: config.json, weights and a tokenizer.

Our norms have no gains, so each gain is folded into the matrix that reads the norm's output. A
config.json that describes a model with other components is refused.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.config import ROPE_BASE, ConfigError, ModelConfig
from mlx_randygpt.exchange import ExchangeError, arcee
from mlx_randygpt.exchange.importers import gpt2
from mlx_randygpt.exchange.importers.imported_model import ImportedModel, whole
from mlx_randygpt.exchange.importers.tensors import (
    LazyTensor,
    read_float32,
    read_json,
    refuse_others,
)
from mlx_randygpt.exchange.importers.vocabulary import tokenizer_at
from mlx_randygpt.model import parameter_shapes
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Params

RECIPE = "portable"
SIZES = {  # our name -> name in config.json
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
FIXED = {  # settings that change the results, and their only supported values
    "hidden_act": "relu2",
    "rms_norm_eps": arcee.NORM_EPS,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}
WTE, HEAD = "wte.weight", "lm_head.weight"


def read_folder(source: Path, vocab: Path | None) -> ImportedModel:
    """Read the model in a folder; raise ExchangeError if it is not an Arcee that we support."""
    path = source / "config.json"
    config = read_json(path)
    model = _model(path, config)
    file, stored = gpt2.stored_in(source)
    tied = config.get("tie_word_embeddings") is True
    params = weights(file, model, stored, arcee.HF, tied=tied)
    tokenizer = tokenizer_at(vocab or source, model.vocab_size)
    return ImportedModel(arcee.MODEL_TYPE, source, model, params, tokenizer, recipe=RECIPE)


def weights(
    path: Path,
    model: ModelConfig,
    stored: Mapping[str, LazyTensor],
    program: int,
    *,
    tied: bool = False,
) -> Params:
    """Return the weights among the tensors of a file of `program`, by our names.

    With `tied`, a head that is not stored is the embedding.
    """
    names = arcee.matrix_names(model.n_layer, program)
    norms = dict(arcee.norm_names(model.n_layer, program))
    if tied and names[HEAD][0] not in stored:
        names[HEAD] = names[WTE]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (model.n_embd,))
    for ours, shape in parameter_shapes(model).items():
        shapes |= dict.fromkeys(names[ours], (shape[0] // len(names[ours]), shape[1]))
    tensors = read_float32(path, shapes, stored)
    refuse_others(path, stored.keys() - shapes.keys())
    params: Params = {}
    for ours in parameter_shapes(model):
        parts = [tensors[name] for name in names[ours]]
        if program == arcee.HF and len(parts) == 3:  # query and key, not value
            parts[:2] = [arcee.halves_to_pairs(part, model.n_head) for part in parts[:2]]
        params[ours] = np.concatenate(parts)
    for norm, reader in norms.items():
        params[reader] *= tensors[norm]
    return params


def build_model(source: Path, sizes: Mapping[str, Any], rope_base: Any) -> ModelConfig:
    """Return the configuration of an Arcee with these sizes; raise ExchangeError for bad ones.

    Without a rope base (None) it is that of transformers and llama.cpp.
    """
    rope_base = ROPE_BASE if rope_base is None else rope_base
    if not isinstance(rope_base, int | float) or isinstance(rope_base, bool):
        raise ExchangeError(f"{source} has rope base {reprlib.repr(rope_base)}; it is a number")
    switches = RECIPES[RECIPE]["model"] | {"rope_base": float(rope_base)}
    try:
        return ModelConfig(**switches, **sizes)
    except ConfigError as error:
        raise ExchangeError(f"{source}: {error}") from error


def _model(path: Path, config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a config.json describes."""
    if config.get("model_type") != arcee.MODEL_TYPE:
        raise ExchangeError(f"{path} has a model_type other than {arcee.MODEL_TYPE}")
    sizes = {ours: whole(config, theirs, path) for ours, theirs in SIZES.items()}
    n_embd, n_head = sizes["n_embd"], sizes["n_head"]
    expected = FIXED | {
        "intermediate_size": 4 * n_embd,
        "num_key_value_heads": n_head,
        "head_dim": n_embd // n_head,
    }
    settings, rope_base = dict(config), config.get("rope_theta")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):  # since transformers 5
        rope_base = rope.get("rope_theta", rope_base)
        if rope.get("rope_type", "default") != "default":
            settings["rope_scaling"] = rope
    for name, value in expected.items():
        if (seen := settings.get(name, value)) != value and seen is not None:
            raise ExchangeError(f"{path} has {name}={reprlib.repr(seen)}; supported is {value}")
    return build_model(path, sizes, rope_base)
