"""Folders of exported files, written as a whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from mlx_randygpt import files
from mlx_randygpt.exchange import ExchangeError

EXPORTED_NAMES = {  # a folder with any other file is not replaced
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.gguf",
    "Modelfile",
    "tokenizer.json",
    "tokenizer_config.json",
    "configuration_mlxgpt.py",
    "modeling_mlxgpt.py",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "mlx_lm_model.py",
    "mlx_model.py",
    "__pycache__",
}


def write_folder(folder: Path, contents: Mapping[str, bytes], overwrite: bool = False) -> None:
    """Replace `folder` by one that holds `contents`, a map from file names to bytes.

    An existing folder must be empty or, with `overwrite`, hold nothing but an export.
    """
    folder = files.resolve(folder)
    try:
        _refuse_to_lose(folder, overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.replace_folder(folder) as new:
            for name, content in contents.items():
                (new / name).write_bytes(content)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f"; it needs {sum(map(len, contents.values())) / 1e6:.1f} MB"
        raise ExchangeError(f"could not write {folder}: {reason}") from error


def _refuse_to_lose(folder: Path, overwrite: bool) -> None:
    """Raise ExchangeError if `folder` holds anything that replacing it would lose."""
    if not files.exists(folder):
        return
    if not files.is_folder(folder):
        raise ExchangeError(f"-o {folder} is a file; give a folder")
    names = sorted(path.name for path in folder.iterdir())
    if names and not overwrite:
        raise ExchangeError(
            f"{folder} is not empty (it holds {names[0]}); "
            "--overwrite replaces an export, -o DIR writes elsewhere"
        )
    if foreign := [name for name in names if name not in EXPORTED_NAMES]:
        raise ExchangeError(
            f"{folder} holds {foreign[0]}, which no export writes, so the folder is not "
            "replaced; give another -o"
        )
