"""The format `safetensors`: a checkpoint without its moments, for inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_randygpt.checkpoint import Checkpoint, serialize
from mlx_randygpt.state import TrainState

WEIGHTS = "model.safetensors"


def weights_files(saved: Checkpoint) -> dict[str, bytes]:
    """Return one file, which is still a checkpoint: its header has settings and vocabulary."""
    state = TrainState(saved.state.step, saved.state.params, {})
    slim = replace(saved, state=state, data=without_folders(saved.data))
    return {WEIGHTS: b"".join(serialize(slim))}


def without_folders(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data record with paths reduced to file names, for privacy."""
    record = {**data, "paths": [Path(path).name for path in data["paths"]]}
    if isinstance(source := data.get("imported"), dict):
        record["imported"] = {**source, "source": Path(str(source.get("source"))).name}
    return record
