"""The cache of tokens: files that are written completely or not at all, and read in windows.

A file holds, in this order: the tokens (of 16 or 32 bits; signed if some are stored as their
complement), the starts of documents (int64), a header in JSON, the SHA-256 of the header, its
length, and MAGIC. It thus begins like a plain token file, and its end shows whether it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt import files
from mlx_randygpt.data import DataError
from mlx_randygpt.data.token_file import OpenFile, TokenFile

MAGIC = b"mlxgptk4"
DIGEST_BLOCK = 1 << 24  # bytes of tokens that one digest covers
TAIL_BYTES = 32 + 8 + len(MAGIC)  # after the header
FOLDER_VARIABLE = "MLXGPT_CACHE"  # environment variable for another folder
MAX_UNUSED_DAYS = 90  # after which a file is removed
CACHE_FILE = re.compile(r"[0-9a-f]{32}\.(tokens|tokenizer\.json|txt)")
MAX_UINT16_VOCAB = 1 << 16  # larger vocabularies take four bytes per token
Array = NDArray[Any]
Buffer = bytes | memoryview


class CachedTokens(NamedTuple):
    """The content of a file; its tokens are read when they are asked for."""

    tokens: TokenFile  # (n,) 16 or 32 bits
    starts: NDArray[np.int64]  # (documents,)
    facts: dict[str, Any]  # the header


def default_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of caches: MLXGPT_CACHE, else mlx-randygpt in XDG_CACHE_HOME or ~/.cache.

    Without a home folder it is .cache in the current folder.
    """
    own = environ.get(FOLDER_VARIABLE)
    path = Path(own or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "mlx-randygpt"))
    try:
        return path.expanduser()
    except RuntimeError:  # a process without HOME whose user has no name, as in some containers
        return Path(*path.parts[1:])


def key(*parts: object) -> str:
    """Return a file name that depends on everything the file was made from."""
    return sha256(json.dumps([MAGIC.decode(), *parts], sort_keys=True).encode()).hexdigest()[:32]


def write(
    path: Path,
    blocks: Iterable[Array],
    vocab_size: int,
    finish: Callable[[], tuple[Any, dict[str, Any]]],
    *,
    signed: bool = False,
) -> None:
    """Write the blocks as one file; `finish` then returns the starts of documents and the facts.

    `signed` has room for tokens that are stored as their complement.

    The name exists only once the complete file is on the disk. Files of the folder that were not
    read for MAX_UNUSED_DAYS are removed. Raises DataError if the file cannot be written.
    """
    small, large = (np.int16, np.int32) if signed else (np.uint16, np.uint32)
    dtype = np.dtype(small if vocab_size <= MAX_UINT16_VOCAB >> signed else large)
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        files.sweep(path.parent)
        _forget(path.parent, time.time() - MAX_UNUSED_DAYS * 86_400)
        with files.replace(path, private=True) as file:
            n_tokens, digests = 0, BlockDigests()
            for block in blocks:
                n_tokens += len(block)
                file.write(digests.add(block.astype(dtype).tobytes()))
            file.write(bytes(-n_tokens * dtype.itemsize % 8))  # align the starts to 8 bytes
            starts, facts = finish()
            file.write(begins := np.asarray(starts, np.int64).tobytes())
            head = {"tokens": n_tokens, "dtype": dtype.name, "documents": len(starts), **facts}
            head |= {"digests": digests.finish(), "starts_digest": _digest(begins)}
            content = json.dumps(head, sort_keys=True).encode()
            length = len(content).to_bytes(8, "little")
            file.write(content + sha256(content).digest() + length + MAGIC)
    except OSError as error:
        raise _write_error(path, error) from error


def write_small(path: Path, content: bytes) -> None:
    """Write a small file beside the tokens, with the same guarantees."""
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        with files.replace(path, private=True) as file:
            file.write(content)
    except OSError as error:
        raise _write_error(path, error) from error


def read_small(path: Path) -> bytes:
    """Return the content of a small file, b"" if it is missing; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        raise _read_error(path, error) from error


def keep_text(stream: IO[bytes]) -> Path:
    """Copy a text that can be read only once into the cache folder; return its file.

    The name depends on the content, and a run that is resumed reads it again.
    """
    path, digest = default_folder() / f"{secrets.token_hex(16)}.txt", sha256()
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        with files.replace(path, private=True) as file:
            while content := stream.read(1 << 20):
                digest.update(content)
                file.write(content)
        return path.replace(path.with_name(f"{digest.hexdigest()[:32]}.txt"))
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the tokens cannot be written to {path.parent}: {error.strerror or error}; "
        f"set {FOLDER_VARIABLE} to a folder with room for two to four bytes per token"
    )


def _read_error(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read: {error.strerror or error}; set {FOLDER_VARIABLE} to another folder"
    )


def read(path: Path) -> CachedTokens | None:
    """Open the tokens of a file; return None if it is missing or incomplete."""
    try:
        file = OpenFile(path)
        tail = file.read(max(0, file.size - TAIL_BYTES), TAIL_BYTES)
        n_bytes = int.from_bytes(tail[32:40], "little")
        if tail[40:] != MAGIC or n_bytes > file.size - TAIL_BYTES:
            return None
        content = file.read(file.size - TAIL_BYTES - n_bytes, n_bytes)
        if sha256(content).digest() != tail[:32]:
            return None
        facts = json.loads(content)
        dtype, n_tokens, n_starts = np.dtype(facts["dtype"]), facts["tokens"], facts["documents"]
        end = n_tokens * dtype.itemsize
        if _file_digests(file, end) != facts["digests"] or not n_tokens:
            return None
        end += -end % 8
        begins = file.read(end, 8 * n_starts)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _read_error(path, error) from error
    if end + 8 * n_starts + n_bytes + TAIL_BYTES != file.size:
        return None
    if _digest(begins) != facts["starts_digest"]:
        return None
    mark_used(path)
    return CachedTokens(TokenFile(file, dtype, n_tokens), np.frombuffer(begins, np.int64), facts)


class BlockDigests:
    """The digests of consecutive blocks of DIGEST_BLOCK bytes, whatever parts they come in."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._hash, self._n = sha256(), 0

    def add(self, content: Buffer) -> Buffer:
        """Take the next bytes, and return them."""
        rest = memoryview(content)
        while rest:
            part = rest[: DIGEST_BLOCK - self._n]
            self._hash.update(part)
            self._n, rest = self._n + len(part), rest[len(part) :]
            if self._n == DIGEST_BLOCK:
                self._end()
        return content

    def finish(self) -> list[str]:
        """Return the digests of all blocks in hexadecimal."""
        if self._n:
            self._end()
        return self._done

    def _end(self) -> None:
        self._done.append(self._hash.hexdigest())
        self._hash, self._n = sha256(), 0


def _file_digests(file: OpenFile, n_bytes: int) -> list[str]:
    """Return the digests of the first `n_bytes` of a file."""
    digests, at = BlockDigests(), 0
    while at < n_bytes and (part := file.read(at, min(n_bytes - at, 1 << 20))):
        digests.add(part)
        at += len(part)
    return digests.finish()


def _digest(content: Buffer) -> str:
    return sha256(content).hexdigest()


def mark_used(path: Path) -> None:
    """Mark a file as read now, so that it is kept for another MAX_UNUSED_DAYS."""
    with contextlib.suppress(OSError):  # a folder of another user
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _forget(folder: Path, before: float) -> None:
    """Remove cache files that were last read before this time, in seconds since 1970.

    A process that has one of them open can still read it.
    """
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            facts = path.stat()
            if CACHE_FILE.fullmatch(path.name) and max(facts.st_atime, facts.st_mtime) < before:
                path.unlink()
