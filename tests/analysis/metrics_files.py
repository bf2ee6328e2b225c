"""Metrics files as a run writes them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def row(step: int, loss: float, **more: Any) -> str:
    names = {"step": step, "loss": loss, "lr": 0.01 / step, "grad_norm": 1.5, "tokens": 64 * step}
    return json.dumps(names | {"tokens_per_second": 1000.25, "seconds": 0.5 * step} | more) + "\n"


def evaluation(step: int, loss: float) -> str:
    return json.dumps({"step": step, "val_loss": loss, "perplexity": 2.0, "seconds": 1.0}) + "\n"


def write(folder: Path, text: str, settings: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.toml").write_text(settings)
    return folder
