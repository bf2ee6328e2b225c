"""Export a checkpoint as files for other programs.

Each format is a module of `exporters` that turns a checkpoint into named files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.exchange import ExchangeError, arcee
from mlx_randygpt.exchange.exporters.adapters import adapter_files
from mlx_randygpt.exchange.exporters.arcee import arcee_files
from mlx_randygpt.exchange.exporters.card import card
from mlx_randygpt.exchange.exporters.folder import write_folder
from mlx_randygpt.exchange.exporters.gguf import gguf_files
from mlx_randygpt.exchange.exporters.gpt2 import gpt2_files
from mlx_randygpt.exchange.exporters.hf import native_files
from mlx_randygpt.exchange.exporters.weights import weights_files


def build_files(
    saved: Checkpoint, kind: str, name: str, outtype: str | None = None
) -> dict[str, bytes]:
    """Return file name -> content of an export called `name`, the model card included.

    `outtype` is the type of a GGUF's matrices, a key of GGUF_OUTTYPES. Raises ExchangeError if the
    format cannot hold the model.
    """
    if outtype is not None and kind != "gguf":
        raise ExchangeError(f"--outtype {outtype} is for --format gguf; {kind} holds float32")
    for weight, array in saved.state.params.items():
        if not np.isfinite(array).all():
            raise ExchangeError(f"{weight} is not finite; export an earlier checkpoint")
    if kind == "adapters":
        return adapter_files(saved, name)
    if kind == "safetensors":
        files = weights_files(saved)
    elif kind == "gguf":
        files = gguf_files(saved, name, outtype or "f32")
    elif saved.model.is_gpt2:
        files = gpt2_files(saved, kind)
    elif kind == "hf" and not arcee.find_misfit(saved.model):
        files = arcee_files(saved)
    else:
        files = native_files(saved)
    return {**files, "README.md": card(saved, kind, name).encode()}


def export(
    saved: Checkpoint,
    kind: str,
    folder: Path,
    *,
    outtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the files of `kind` (a key of EXPORT_FORMATS) to `folder`; return name -> bytes.

    The folder is written completely or not at all.
    """
    files = build_files(saved, kind, folder.absolute().name, outtype)
    write_folder(folder, files, overwrite)
    return {name: len(content) for name, content in files.items()}
