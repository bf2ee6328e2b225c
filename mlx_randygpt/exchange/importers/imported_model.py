"""The record that every importer returns, and its conversion to a checkpoint."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.progress import Progress
from mlx_randygpt.recipes import DEFAULT_PRESET, PRESETS, RECIPES
from mlx_randygpt.settings import MODEL_SIZES
from mlx_randygpt.state import Params, TrainState
from mlx_randygpt.tokenizers import Tokenizer


@dataclass(frozen=True)
class ImportedModel:
    """An imported model, with notes on the assumptions of the importer."""

    format: str
    source: Path
    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    moments: dict[str, Params] = field(default_factory=dict)
    step: int = 0
    best_loss: float = math.inf
    train: Mapping[str, Any] = field(default_factory=dict)  # override the recipe's settings
    notes: tuple[str, ...] = ()
    recipe: str = "classic"

    def checkpoint(self) -> Checkpoint:
        """Return a checkpoint from which a new run starts or, with moments, this one resumes."""
        sizes = [getattr(self.model, name) for name in MODEL_SIZES]
        presets = (
            n for n, p in PRESETS.items() if [getattr(p, name) for name in MODEL_SIZES] == sizes
        )
        settings = {**RECIPES[self.recipe]["train"], **self.train}
        settings |= {"iters": max(self.step, settings.get("iters", 1000))}
        train = TrainConfig(recipe=self.recipe, preset=next(presets, DEFAULT_PRESET), **settings)
        progress = Progress()
        if math.isfinite(self.best_loss):
            progress = Progress(best_loss=self.best_loss, best_step=self.step)
        data = {
            "paths": [],
            "characters": 0,
            "sha256": "",
            "imported": {"format": self.format, "source": str(self.source)},
        }
        state = TrainState(self.step, self.params, self.moments)
        return Checkpoint(
            model=self.model,
            train=train,
            progress=progress,
            tokenizer=self.tokenizer.to_json(),
            data=data,
            backend=self.format,
            state=state,
        )


def whole(values: Mapping[str, Any], name: str, source: Path, default: int | None = None) -> int:
    """Return a size from a file; raise ExchangeError unless it is an integer of at least 1."""
    value = values.get(name, default)
    if type(value) is not int or value < 1:
        raise ExchangeError(
            f"{source}: {name}={reprlib.repr(value)} is not a whole number of at least 1"
        )
    return value
