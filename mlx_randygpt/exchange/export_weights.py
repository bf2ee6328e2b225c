"""The format `safetensors`: a checkpoint without its moments, for inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.state import TrainState

WEIGHTS = "model.safetensors"


def weights_files(saved: Checkpoint) -> dict[str, bytes]:
    """One file that is a checkpoint still: settings, vocabulary and a checksum are in its header.
    It names the run's texts without the folders they were in."""
    state = TrainState(saved.state.step, saved.state.params, {})
    names = [Path(path).name for path in saved.data["paths"]]
    slim = replace(saved, state=state, data={**saved.data, "paths": names})
    with TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS)
        save_checkpoint(path, slim)
        return {WEIGHTS: path.read_bytes()}
