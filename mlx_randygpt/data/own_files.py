"""What this program wrote itself, found among the texts of a folder: logs, pages, exports, caches.

A file counts by its name together with its content or place, so that a text is not mistaken.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_randygpt.data import cache
from mlx_randygpt.files import is_file, resolve

HEAD_BYTES = 1 << 16  # of a file, in which its mark stands
LOGS = {  # of a run, and the keys of their lines
    "metrics.jsonl": ({"step", "loss"}, {"step", "val_loss"}),
    "samples.jsonl": ({"step", "prompt", "text"},),
}
PAGE_MARKS = (
    b'<meta name="generator" content="mlxgpt">',
    b"<title>What the model learned</title>",  # pages of older versions
)
EXPORTED_CODE = ("configuration_mlxgpt.py", "modeling_mlxgpt.py", "mlx_lm_model.py", "mlx_model.py")


def is_own(file: Path) -> bool:
    """Return whether a run, `inspect`, `plot`, `export` or the cache wrote this file.

    Raises OSError if it cannot be read.
    """
    name = file.name.lower()
    if name in LOGS:
        return _is_log(file, LOGS[name])
    if name in EXPORTED_CODE:
        return is_file(file.parent / "config.json")
    if name == "readme.md":
        head = _head(file)
        return head.startswith(b"---\n") and (b"mlxgpt" in head or b"mlx-randygpt" in head)
    if name.endswith(".html"):
        return any(mark in _head(file)[:1024] for mark in PAGE_MARKS)
    kept = bool(cache.CACHE_FILE.fullmatch(file.name))
    return kept and resolve(file).parent == resolve(cache.default_folder())


def _is_log(file: Path, kinds: tuple[set[str], ...]) -> bool:
    head = _head(file)
    if not head:  # of a run that has not written a line yet
        return any(fnmatch(name, "checkpoint*.safetensors") for name in os.listdir(file.parent))
    try:
        row: Any = json.loads(head.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and any(keys <= row.keys() for keys in kinds)


def _head(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(HEAD_BYTES)
