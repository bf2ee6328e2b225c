"""What all ranks of a run must have in common: rank 0's start message, and digests to compare."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt import __version__
from mlx_randygpt.checkpoint import (
    Checkpoint,
    dataclass_from_json,
    header_facts,
    header_of,
    progress_from_json,
    to_strict_json,
)
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import initial_params
from mlx_randygpt.state import TrainState
from mlx_randygpt.training.loop import Run, step_batches


def start_message(saved: Checkpoint | None, run: Run) -> dict[str, Any]:
    """Return the start message of rank 0; arrays are sent separately."""
    return {
        "checkpoint": to_strict_json(header_of(saved)) if saved else None,
        "paths": run.data["paths"],
        "tokenizer": run.tokenizer.to_json(),
    }


def checkpoint_without_arrays(header: dict[str, Any]) -> Checkpoint:
    """Return rank 0's checkpoint from its header, with initial weights of the right shapes."""
    model = dataclass_from_json(ModelConfig, header["model"])
    train = dataclass_from_json(TrainConfig, header["train"])
    step, backend, data = header_facts(header)
    return Checkpoint(
        model=model,
        train=train,
        progress=progress_from_json(header["progress"]),
        tokenizer=header["tokenizer"],
        data=data,
        backend=backend,
        state=TrainState(step, initial_params(model, train.seed), {}),
    )


def agreed_values(run: Run, backend_name: str) -> dict[str, Any]:
    """Return the values that must be equal on all ranks, keyed by their names in error messages."""
    return {
        "version of mlx-randygpt": __version__,
        "backend": backend_name,
        "text": [run.data["sha256"], len(run.train_tokens), len(run.val_tokens)],
        "tokenizer": run.tokenizer.to_json(),
        "model": asdict(run.model),
        "setting": asdict(replace(run.train, threads=0)),
        "step of the checkpoint": to_strict_json(asdict(run.progress)),
        "--respect-documents": run.data["respect_documents"],
        "--pack": run.data["pack"],
        "weights of --data": _first_starts(run),
    }


def _first_starts(run: Run) -> list[int]:
    """Return the starts of the first training windows; every setting that draws them matters."""
    (batch, *_) = step_batches(run.train, run.train_tokens, run.model.block_size, 0, run.windows)
    starts: list[int] = batch.starts.tolist()
    return starts


def digest_arrays(arrays: Any) -> str:
    """Return a digest of arrays in nested dicts and lists."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            digest.update(np.ascontiguousarray(value).data)
            return
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in sorted(items):
            digest.update(f"\n{name}\n".encode())
            add(part)

    add(arrays)
    return digest.hexdigest()


def digest_json(value: Any) -> NDArray[np.int32]:
    """Return eight numbers that stand for a JSON-serialisable value."""
    content = json.dumps(value, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(content).digest(), np.int32)
