"""A model that came from elsewhere, as one of our checkpoints, whatever wrote it."""

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
from mlx_randygpt.state import Params, TrainState
from mlx_randygpt.tokenizers.chars import Tokenizer

SIZES = ("n_layer", "n_head", "n_embd", "block_size")  # what a preset names


@dataclass(frozen=True)
class ImportedModel:
    """What a reader found, and what it had to assume."""

    format: str
    source: Path
    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    moments: dict[str, Params] = field(default_factory=dict)
    step: int = 0
    best_loss: float = math.inf
    train: Mapping[str, Any] = field(default_factory=dict)  # over those of the recipe
    notes: tuple[str, ...] = ()
    recipe: str = "classic"

    def checkpoint(self) -> Checkpoint:
        """The same as a checkpoint of ours, from which a new run begins or, where there are
        moments, its own goes on."""
        sizes = [getattr(self.model, name) for name in SIZES]
        named = (n for n, p in PRESETS.items() if [getattr(p, name) for name in SIZES] == sizes)
        settings = {**RECIPES[self.recipe]["train"], **self.train}
        settings |= {"iters": max(self.step, settings.get("iters", 1000))}
        train = TrainConfig(recipe=self.recipe, preset=next(named, DEFAULT_PRESET), **settings)
        known = math.isfinite(self.best_loss)
        progress = Progress(
            best_loss=self.best_loss if known else math.inf, best_step=self.step if known else 0
        )
        data = {
            "paths": [], "characters": 0, "sha256": "",
            "imported": {"format": self.format, "source": str(self.source)},
        }  # fmt: skip
        state = TrainState(self.step, self.params, self.moments)
        return Checkpoint(
            self.model, train, progress, self.tokenizer.to_json(), data, self.format, state
        )


def whole(values: Mapping[str, Any], name: str, source: Path, default: int | None = None) -> int:
    """A size that a file states; ExchangeError where it is no number of at least 1."""
    value = values.get(name, default)
    if type(value) is not int or value < 1:
        raise ExchangeError(
            f"{source}: {name}={reprlib.repr(value)} is not a whole number of at least 1"
        )
    return value
