"""Tokens in a file that is read in windows, never mapped.

A map of a file that another process cuts off would end this process with SIGBUS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt import files
from mlx_randygpt.data import DataError

Array = NDArray[Any]
Stamp = tuple[int, int]  # size and time of the last change


class OpenFile:
    """A file that stays open, and whose content must not change meanwhile; OSError if missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._opened = self._stamp()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    @property
    def size(self) -> int:
        """The bytes that it had when it was opened."""
        return self._opened[0]

    def read(self, start: int, n: int) -> bytes:
        """Return n bytes, or those up to the end; raise DataError if the file has changed."""
        content = files.read_at(self._descriptor, start, n)
        if len(content) < n:
            self.check()
        return content

    def check(self) -> None:
        """Raise DataError if the file was changed since it was opened."""
        if self._stamp() != self._opened:
            raise DataError(
                f"{self.path} was changed while it was in use; mlxgpt makes it again when you "
                "start again (mlxgpt train --resume)"
            )

    def _stamp(self) -> Stamp:
        facts = os.fstat(self._descriptor)
        return facts.st_size, facts.st_mtime_ns


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Consecutive tokens of a file, indexed like an array of them; np.asarray reads them all.

    Raises DataError rather than return anything else than what the file held when it was opened.
    """

    file: OpenFile
    dtype: np.dtype[Any]
    n: int
    first: int = 0  # token of the file

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: slice) -> TokenFile: ...
    @overload
    def __getitem__(self, index: NDArray[np.int64]) -> Array: ...
    def __getitem__(self, index: slice | NDArray[np.int64]) -> TokenFile | Array:
        """Return a slice, which reads nothing, or the tokens at positions that ascend in rows."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.n)
            return replace(self, first=self.first + start, n=max(0, stop - start))
        rows = index.reshape(-1, index.shape[-1])
        windows = [self._span(row[0], row[-1] + 1)[row - row[0]] for row in rows]
        self.file.check()
        return np.stack(windows).reshape(index.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        tokens = self._span(0, self.n)
        self.file.check()
        return tokens.astype(dtype or self.dtype, copy=bool(copy))

    def _span(self, start: int, stop: int) -> Array:
        width = self.dtype.itemsize
        content = self.file.read((self.first + int(start)) * width, int(stop - start) * width)
        return np.frombuffer(content, self.dtype)
