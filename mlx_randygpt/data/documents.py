"""Windows that stay inside one document: where they may begin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError


@dataclass(frozen=True, eq=False)
class Documents:
    """The places where a window and the token after it lie inside one document."""

    first: NDArray[np.int64]  # token of each document
    ahead: NDArray[np.int64]  # such places in the documents before it, and at the end in all

    @classmethod
    def within(cls, first: NDArray[np.int64], n_tokens: int, block_size: int) -> Documents:
        """Those in the first `n_tokens` tokens; DataError where every document is too short."""
        first = first[first < n_tokens]
        lengths = np.diff(first, append=n_tokens)
        ahead = np.append(0, np.cumsum(np.maximum(lengths - block_size, 0)))
        if not ahead[-1]:
            raise DataError(
                f"the longest document has {lengths.max()} tokens; --respect-documents needs one "
                f"of {block_size + 1}, a context and the token after it: lower --block-size"
            )
        return cls(first, ahead)

    @property
    def n_left_out(self) -> int:
        """Documents that are too short for a window and the token after it."""
        return int((np.diff(self.ahead) == 0).sum())

    def starts(self, random: np.random.Generator, n: int) -> NDArray[np.int64]:
        """`n` of the places, each as likely as any other."""
        at = random.integers(0, self.ahead[-1], size=n)
        document = np.searchsorted(self.ahead, at, side="right") - 1
        return self.first[document] + at - self.ahead[document]
