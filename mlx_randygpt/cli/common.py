"""What the ranks of a run must have in common, in a form that can be sent and compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt import __version__
from mlx_randygpt.checkpoint import Checkpoint, header_of
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.records import header_facts, progress, record, strict
from mlx_randygpt.state import TrainState, initial_params
from mlx_randygpt.train import Run


def told(saved: Checkpoint | None, run: Run) -> dict[str, Any]:
    """What the other ranks begin with, as rank 0 tells it; its arrays follow later."""
    return {
        "checkpoint": strict(header_of(saved)) if saved else None,
        "paths": run.data["paths"],
        "tokenizer": run.tokenizer.to_json(),
    }


def checkpoint_without_arrays(header: dict[str, Any]) -> Checkpoint:
    """Rank 0's checkpoint from its header; the weights are first ones, of the right shapes."""
    model, config = record(ModelConfig, header["model"]), record(TrainConfig, header["train"])
    step, backend, data = header_facts(header)
    state = TrainState(step, initial_params(model, config.seed), {})
    reached = progress(header["progress"])
    return Checkpoint(model, config, reached, header["tokenizer"], data, backend, state)


def facts(run: Run, backend_name: str) -> dict[str, Any]:
    """What must be the same on every rank."""
    return {
        "version of mlx-randygpt": __version__,
        "backend": backend_name,
        "text": [run.data["sha256"], len(run.train_tokens), len(run.val_tokens)],
        "tokenizer": run.tokenizer.to_json(),
        "model": asdict(run.model),
        "setting": asdict(replace(run.train, threads=0)),
        "step of the checkpoint": strict(asdict(run.progress)),
        "--respect-documents": run.documents is not None,
    }


def hashed(values: Any) -> str:
    """A digest of arrays in nested dicts."""
    found = hashlib.sha256()

    def read(value: Any) -> None:
        if isinstance(value, np.ndarray):
            found.update(np.ascontiguousarray(value).data)
            return
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in sorted(inner):
            found.update(f"\n{name}\n".encode())
            read(part)

    read(values)
    return found.hexdigest()


def digest(value: Any) -> NDArray[np.int32]:
    """Eight numbers that stand for a value JSON can hold."""
    text = json.dumps(value, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(text).digest(), np.int32)
