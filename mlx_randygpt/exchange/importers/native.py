"""Import the folder that `mlxgpt export` wrote for transformers and mlx-lm.

It holds config.json, weights under our own names and tokenizer.json, possibly after further
training in one of those programs.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from mlx_randygpt.checkpoint import dataclass_from_json
from mlx_randygpt.config import ConfigError, ModelConfig
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importers import gpt2
from mlx_randygpt.exchange.importers.imported_model import ImportedModel
from mlx_randygpt.exchange.importers.tensors import params_of, read_json, refuse_others
from mlx_randygpt.exchange.importers.vocabulary import tokenizer_at
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.settings import MODEL_SIZES

MODEL_TYPE = "mlxgpt"


def read_folder(source: Path, vocab: Path | None) -> ImportedModel:
    """Read the model in a folder; raise ExchangeError if `mlxgpt export` did not write it."""
    model = _model(source / "config.json")
    path, stored = gpt2.stored_in(source)
    params = params_of(path, model, stored)
    refuse_others(path, stored.keys() - params.keys())
    tokenizer = tokenizer_at(vocab or source, model.vocab_size)
    return ImportedModel(MODEL_TYPE, source, model, params, tokenizer, recipe=_recipe(model))


def _model(path: Path) -> ModelConfig:
    config = read_json(path)
    if config.get("model_type") != MODEL_TYPE:
        raise ExchangeError(f"{path} has a model_type other than {MODEL_TYPE}")
    if missing := [name for name in ("vocab_size", *MODEL_SIZES) if name not in config]:
        raise ExchangeError(f"{path} lacks {missing[0]}")
    settings = {f.name: config[f.name] for f in fields(ModelConfig) if f.name in config}
    try:
        return dataclass_from_json(ModelConfig, settings)
    except ConfigError as error:
        raise ExchangeError(f"{path}: {error}") from error


def _recipe(model: ModelConfig) -> str:
    """Return the recipe with these switches; the folder does not record the run's own."""
    for name, recipe in RECIPES.items():
        switches = {k: v for k, v in recipe["model"].items() if k != "zero_init"}
        if all(getattr(model, k) == v for k, v in switches.items()):
            return name
    return "classic"
