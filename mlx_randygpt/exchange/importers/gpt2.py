"""Import GPT-2 as Hugging Face stores it: a folder of config.json, weights and a tokenizer.

The weights have our names, after an optional prefix `transformer.`. The matrices of attention and
MLP are stored as (in, out). A config.json that describes another model is refused.
"""

from __future__ import annotations

import reprlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.config import ARCHS, ModelConfig
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers.imported_model import ImportedModel, whole
from mlx_randygpt.exchange.importers.tensors import (
    LazyTensor,
    as_float32,
    params_of,
    read_json,
    read_safetensors,
    read_shards,
    refuse_others,
)
from mlx_randygpt.exchange.importers.torch_file import TorchFile
from mlx_randygpt.exchange.importers.vocabulary import tokenizer_at
from mlx_randygpt.files import is_file
from mlx_randygpt.model import GPT2_NORM_EPS, in_out_names

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
PREFIX = "transformer."
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, stored in older files
HF_SIZES = {  # our name -> name in config.json and its default
    "vocab_size": ("vocab_size", 50257),
    "block_size": ("n_positions", 1024),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
}
ACTIVATIONS = {  # Hugging Face's name -> ours
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
FIXED = {  # other settings that change the results, and their only supported values
    "layer_norm_epsilon": GPT2_NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
HEAD, WTE = "lm_head.weight", "wte.weight"


def read_folder(source: Path, vocab: Path | None) -> ImportedModel:
    """Read the model in a folder; raise ExchangeError if it is not a GPT-2 that we support."""
    config = read_json(source / "config.json")
    model = _model(source / "config.json", config)
    path, stored = stored_in(source)
    untied = config.get("tie_word_embeddings", True) is not True
    params = weights(path, model, stored, untied=untied, transposed=in_out_names(model))
    tokenizer = tokenizer_at(vocab or source, model.vocab_size)
    return ImportedModel("gpt2", source, model, params, tokenizer)


def weights(
    path: Path,
    model: ModelConfig,
    stored: Mapping[str, LazyTensor],
    *,
    untied: bool = False,
    transposed: Container[str] = (),
) -> dict[str, Any]:
    """Return the weights among the tensors of a file, by our names.

    A stored head must equal the embedding; if the config says `untied`, it must be stored.
    """
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in stored.items()
        if not name.endswith(BUFFERS)
    }
    head = tensors.pop(HEAD, None)
    params = params_of(path, model, tensors, transposed)
    refuse_others(path, tensors.keys() - params.keys())
    if head is None and untied:
        raise ExchangeError(
            f"{path} lacks {HEAD}, which is not tied to the embedding by its config"
        )
    if head is not None and not _equal(head, params[WTE]):
        raise ExchangeError(f"{path}: {HEAD} is not {WTE}; our GPT-2 has one matrix for both")
    return params


def _model(path: Path, config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a config.json describes."""
    if config.get("model_type") != "gpt2":
        raise ExchangeError(f"{path} has model_type={_shorten(config.get('model_type'))}, not gpt2")
    sizes: dict[str, Any] = {
        ours: whole(config, theirs, path, default) for ours, (theirs, default) in HF_SIZES.items()
    }
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ExchangeError(
                f"{path} has {name}={_shorten(config[name])}; our GPT-2 has {value}"
            )
    inner = config.get("n_inner")
    if inner is not None and inner != 4 * sizes["n_embd"]:
        raise ExchangeError(
            f"{path} has n_inner={_shorten(inner)}; our MLP is 4·n_embd={4 * sizes['n_embd']} wide"
        )
    activation = config.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ExchangeError(
            f"{path} has activation_function={_shorten(activation)}; "
            f"our GPT-2 has {', '.join(ACTIVATIONS)}"
        )
    return ModelConfig(**ARCHS["gpt2"] | {"activation": ACTIVATIONS[activation]}, **sizes)


def stored_in(source: Path) -> tuple[Path, Mapping[str, LazyTensor]]:
    """Return the file of weights in a folder, and its tensors."""
    path = next((source / name for name in WEIGHTS if is_file(source / name)), None)
    if path is None:
        raise ExchangeError(f"{source} holds no weights; looked for {', '.join(WEIGHTS)}")
    return path, _stored(path)


def _stored(path: Path) -> Mapping[str, LazyTensor]:
    if path.name.endswith(".index.json"):
        return read_shards(path.parent, path.name)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return tensors_of(path, TorchFile(path).value)


def tensors_of(path: Path, state: Any) -> dict[str, LazyTensor]:
    """Return `state` if it is a state_dict; raise ExchangeError for anything else."""
    if not isinstance(state, dict):
        raise ExchangeError(f"{path} does not hold tensors by name")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, LazyTensor)):
            raise ExchangeError(
                f"{path} has {_shorten(name)} among its weights, which is not a tensor"
            )
    return state


def _equal(head: LazyTensor, wte: Any) -> bool:
    if head.shape != wte.shape:
        return False
    return bool(np.array_equal(as_float32(head.read(), head.kind).reshape(wte.shape), wte))


def _shorten(value: Any) -> str:
    return reprlib.repr(value)
