"""Tokens on the disk: written once, whole or not at all, and read through a memory map.

Owns the file and its place; knows nothing of text or tokenizers. A file holds, one after the
other: the tokens (uint16 or uint32), the starts of documents (int64), JSON, its SHA-256, its length
and MAGIC. So it begins as a plain token file, and its end says whether all of it is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt import files
from mlx_randygpt.data import DataError

MAGIC = b"mlxgptk1"
TAIL = 32 + 8 + len(MAGIC)  # bytes after the JSON
PLACE = "MLXGPT_CACHE"  # environment: another folder
KEPT_DAYS = 90  # since a run has last read it
OURS = re.compile(r"[0-9a-f]{32}\.(tokens|tokenizer\.json)")
MAX_UINT16_VOCAB = 1 << 16  # vocabularies up to it take two bytes a token
Array = NDArray[Any]


class Mapped(NamedTuple):
    """A file that was opened; the arrays are maps of it."""

    tokens: Array  # (n,) uint16 or uint32
    starts: NDArray[np.int64]  # (documents,)
    facts: dict[str, Any]  # as they were written


def place(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of caches: MLXGPT_CACHE, else mlx-randygpt in XDG_CACHE_HOME or ~/.cache; where
    nobody is at home, in .cache here."""
    own = environ.get(PLACE)
    path = Path(own or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "mlx-randygpt"))
    try:
        return path.expanduser()
    except RuntimeError:  # a process without HOME whose user has no name, as in some containers
        return Path(*path.parts[1:])


def key(*parts: object) -> str:
    """A name that says what a file was made of."""
    return sha256(json.dumps([MAGIC.decode(), *parts], sort_keys=True).encode()).hexdigest()[:32]


def write(
    path: Path,
    blocks: Iterable[Array],
    vocab_size: int,
    finish: Callable[[], tuple[Any, dict[str, Any]]],
) -> None:
    """Write the blocks as one file; `finish` then gives the starts of documents and the facts.

    The name is there once the whole file is on the disk, and what nobody has read for KEPT_DAYS is
    gone by then. DataError where it cannot be written.
    """
    dtype = np.dtype(np.uint16 if vocab_size <= MAX_UINT16_VOCAB else np.uint32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.sweep(path.parent)
        _forget(path.parent, time.time() - KEPT_DAYS * 86_400)
        with files.replace(path) as file:
            n_tokens = 0
            for block in blocks:
                n_tokens += len(block)
                file.write(block.astype(dtype).tobytes())
            file.write(bytes(-n_tokens * dtype.itemsize % 8))  # the starts begin at a multiple of 8
            starts, facts = finish()
            file.write(np.asarray(starts, np.int64).tobytes())
            head = {"tokens": n_tokens, "dtype": dtype.name, "documents": len(starts), **facts}
            content = json.dumps(head, sort_keys=True).encode()
            length = len(content).to_bytes(8, "little")
            file.write(content + sha256(content).digest() + length + MAGIC)
    except OSError as error:
        raise _refused(path, error) from error


def write_small(path: Path, content: bytes) -> None:
    """A small file beside the tokens, in the same way."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replace(path) as file:
            file.write(content)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the tokens cannot be written to {path.parent}: {error.strerror or error}; "
        f"set {PLACE} to a folder with room for two to four bytes a token"
    )


def read(path: Path) -> Mapped | None:
    """The tokens of a file that is whole; None where there is none or it is not."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - TAIL))
            tail = file.read()
            n_bytes = int.from_bytes(tail[32:40], "little")
            if tail[40:] != MAGIC or n_bytes > size - TAIL:
                return None
            file.seek(size - TAIL - n_bytes)
            content = file.read(n_bytes)
    except OSError:
        return None
    if sha256(content).digest() != tail[:32]:
        return None
    facts = json.loads(content)
    dtype, n_starts = np.dtype(facts["dtype"]), facts["documents"]
    end = facts["tokens"] * dtype.itemsize
    end += -end % 8
    if end + 8 * n_starts + n_bytes + TAIL != size or not facts["tokens"]:
        return None
    mark_used(path)
    tokens = np.memmap(path, dtype, "r", shape=(facts["tokens"],))
    starts = np.empty(0, np.int64)
    if n_starts:
        starts = np.asarray(np.memmap(path, np.int64, "r", offset=end, shape=(n_starts,)))
    return Mapped(tokens, starts, facts)


def mark_used(path: Path) -> None:
    """A run has read this file: its KEPT_DAYS begin again."""
    with contextlib.suppress(OSError):  # a folder of somebody else
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _forget(folder: Path, before: float) -> None:
    """Remove our files that were last read before that time; who has mapped one keeps it."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            facts = path.stat()
            if OURS.fullmatch(path.name) and max(facts.st_atime, facts.st_mtime) < before:
                path.unlink()
