"""Files of token ids from other programs: nanoGPT's train.bin and those of llm.c.

nanoGPT writes plain uint16 ids. llm.c puts a header of 256 int32 before them: a magic number for
the width of an id, a version, and the number of ids. The files do not record the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError
from mlx_randygpt.data.encoding import TextStats
from mlx_randygpt.data.files import is_validation
from mlx_randygpt.data.reading import Seen
from mlx_randygpt.tokenizers import NO_TOKEN, Tokenizer

HEADER_BYTES = 256 * 4
MAGICS: dict[int, tuple[int, np.dtype[Any]]] = {  # version, type of an id
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
CHUNK_TOKENS = 1 << 19


def sort_splits(files: list[Path]) -> list[Path]:
    """Sort training files before validation files."""
    return sorted(files, key=is_validation)


def token_blocks(
    files: list[Path], tokenizer: Tokenizer, stats: TextStats, seen: Seen = lambda n: None
) -> Iterator[NDArray[np.int32]]:
    """Yield the ids of the files; raise DataError for an id outside the tokenizer's vocabulary."""
    for file in files:
        dtype, offset = _layout(file)
        with open(file, "rb") as stream:
            stream.seek(offset)
            stats.files.append(len(stats.starts))
            stats.starts.append(stats.n_tokens)
            while raw := stream.read(CHUNK_TOKENS * dtype.itemsize):
                ids = np.frombuffer(raw, dtype)
                if ids.max() >= tokenizer.vocab_size:
                    raise DataError(
                        f"{file} holds the token id {ids.max()}, which is not in a vocabulary of "
                        f"{tokenizer.vocab_size}; give the --tokenizer that made the file"
                    )
                seen(len(raw))
                stats.digest.update(raw)
                if tokenizer.eos != NO_TOKEN:  # otherwise BOS is an ordinary token
                    begins = np.flatnonzero(ids == tokenizer.bos) + stats.n_tokens
                    stats.starts.extend(int(at) for at in begins if at > stats.starts[-1])
                stats.n_tokens += len(ids)
                yield ids.astype(np.int32)


def n_train(files: list[Path]) -> int | None:
    """Count the tokens before the validation files; None if there are no such files."""
    if not any(map(is_validation, files)):
        return None
    if all(map(is_validation, files)):
        raise DataError(f"{files[0]} is a validation file; give the training file too")
    return sum(_n_tokens(file) for file in files if not is_validation(file))


def _n_tokens(file: Path) -> int:
    dtype, offset = _layout(file)
    return (file.stat().st_size - offset) // dtype.itemsize


def _layout(file: Path) -> tuple[np.dtype[Any], int]:
    """Return the type of an id and the offset of the first one."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(12)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    magic, version, n_tokens = np.frombuffer(head.ljust(12, b"\0"), "<i4").tolist()
    if magic not in MAGICS:
        if size % 2 or not size:
            raise DataError(f"{file} is not a token file: {size} bytes, but each id takes two")
        return np.dtype("<u2"), 0
    supported, dtype = MAGICS[magic]
    if version != supported:
        raise DataError(
            f"{file} has version {version} of llm.c's format; only {supported} is supported"
        )
    if HEADER_BYTES + n_tokens * dtype.itemsize != size:
        raise DataError(
            f"{file} is cut off or damaged: its header promises {n_tokens} tokens, "
            f"{HEADER_BYTES + n_tokens * dtype.itemsize} bytes, but it has {size}"
        )
    return dtype, HEADER_BYTES
