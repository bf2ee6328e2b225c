"""A folder of files that is there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mlx_randygpt import files
from mlx_randygpt.exchange import ExchangeError

KNOWN = {  # what a folder that is replaced may hold
    "README.md", "config.json", "generation_config.json", "model.safetensors", "model.gguf",
    "tokenizer.json", "tokenizer_config.json", "configuration_mlxgpt.py", "modeling_mlxgpt.py",
    "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors",
    "mlx_lm_model.py", "mlx_model.py", "__pycache__",
}  # fmt: skip


def write_folder(folder: Path, contents: Mapping[str, bytes], overwrite: bool = False) -> None:
    """Write `contents` into a new folder beside `folder` and rename it. An existing folder must be
    empty or, with `overwrite`, hold nothing but an export, which is replaced as a whole."""
    folder = folder.resolve()
    part = folder.parent / f".{folder.name}.{os.getpid()}.part"
    old = folder.parent / f".{folder.name}.{os.getpid()}.old"
    try:
        _refuse_to_lose(folder, overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        for name, content in contents.items():
            _write(part / name, content)
        files.sync_folder(part)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        files.sync_folder(folder.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f"; it needs {sum(map(len, contents.values())) / 1e6:.1f} MB"
        raise ExchangeError(f"could not write {folder}: {reason}") from error
    finally:
        with suppress(OSError):
            if old.exists() and not folder.exists():
                old.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _refuse_to_lose(folder: Path, overwrite: bool) -> None:
    """ExchangeError where `folder` holds what would be gone."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExchangeError(f"-o {folder} is a file; give a folder")
    held = sorted(path.name for path in folder.iterdir())
    if held and not overwrite:
        raise ExchangeError(
            f"{folder} is not empty (it holds {held[0]}); "
            "--overwrite replaces an export, -o DIR goes elsewhere"
        )
    if foreign := [name for name in held if name not in KNOWN]:
        raise ExchangeError(
            f"{folder} holds {foreign[0]}, which is of no export, so it is not replaced; "
            "give another -o"
        )


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        files.flush(file.fileno())
