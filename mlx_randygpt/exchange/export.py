"""A checkpoint as files for other programs: which formats there are and what each is made of.

Knows nothing of the command line. A format is one module that turns a checkpoint into named files;
`export_folder` writes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.exporters.adapters import adapter_files
from mlx_randygpt.exchange.exporters.card import card
from mlx_randygpt.exchange.exporters.folder import write_folder
from mlx_randygpt.exchange.exporters.gguf import gguf_files
from mlx_randygpt.exchange.exporters.gpt2 import gpt2_files
from mlx_randygpt.exchange.exporters.hf import native_files
from mlx_randygpt.exchange.exporters.weights import weights_files

FORMATS = ("hf", "mlx-lm", "safetensors", "gguf", "adapters")


def files_of(saved: Checkpoint, kind: str, name: str) -> dict[str, bytes]:
    """File name -> content, the model card among them; ExchangeError where the format does not
    fit the model."""
    for weight, array in saved.state.params.items():
        if not np.isfinite(array).all():
            raise ExchangeError(f"{weight} is not finite; export a checkpoint from before that")
    if kind == "adapters":
        return adapter_files(saved, name)
    if kind == "safetensors":
        files = weights_files(saved)
    elif kind == "gguf":
        files = gguf_files(saved, name)
    elif saved.model.is_gpt2:
        files = gpt2_files(saved, kind)
    else:
        files = native_files(saved)
    return {**files, "README.md": card(saved, kind, name).encode()}


def export(
    saved: Checkpoint, kind: str, folder: Path, *, overwrite: bool = False
) -> dict[str, int]:
    """Write the files of `kind`, one of FORMATS, to `folder`, all or none; name -> bytes."""
    files = files_of(saved, kind, folder.absolute().name)
    write_folder(folder, files, overwrite)
    return {name: len(content) for name, content in files.items()}
