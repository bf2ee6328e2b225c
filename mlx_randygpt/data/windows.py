"""Windows of tokens: random ones for training, consecutive ones for evaluation.

The windows depend on the arguments only, so a resumed run sees the same ones.

Legend: B batch, T block_size, n tokens of the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError
from mlx_randygpt.state import Batch, Tokens, rng


def sample_batch(
    tokens: Tokens,
    batch_size: int,
    block_size: int,
    seed: int,
    step: int,
    micro: int = 0,
    documents: Documents | None = None,
) -> Batch:
    """Draw B windows from `tokens` (n,); each start with room for T + 1 tokens is equally likely.

    With `documents`, every window lies inside one document.
    """
    assert len(tokens) > block_size, "check_length runs first"
    random = rng(seed, "batch", step, micro)
    if documents is not None:
        return Batch(tokens, documents.starts(random, batch_size), block_size)
    last = len(tokens) - block_size - 1
    return Batch(tokens, random.integers(0, last, size=batch_size, endpoint=True), block_size)


def eval_batches(
    tokens: Tokens, block_size: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Yield non-overlapping windows in a fixed order; every token but the first is a target once.

    `max_tokens` limits them to that many tokens, but at least one window, spread evenly. All
    batches have the same B, at most `batch_size`: the last is filled with windows past the end,
    whose targets do not count. Weight the loss of a batch by its `n_targets()`.
    """
    if len(tokens) < 2:
        raise DataError(f"{len(tokens)} tokens leave nothing to predict; give at least 2")
    n_windows = -(-(len(tokens) - 1) // block_size)
    n_used = n_windows
    if max_tokens is not None:
        n_used = min(n_windows, max(1, max_tokens // block_size))
    starts = np.arange(n_used, dtype=np.int64) * n_windows // n_used * block_size
    batch_size = min(batch_size, n_used)
    padding = np.full(-n_used % batch_size, len(tokens), dtype=np.int64)
    for rows in np.concatenate([starts, padding]).reshape(-1, batch_size):
        yield Batch(tokens, rows, block_size)


@dataclass(frozen=True, eq=False)
class Documents:
    """The starts at which a window and the token after it lie inside one document."""

    first: NDArray[np.int64]  # first token of each document
    ahead: NDArray[np.int64]  # starts in earlier documents; the last entry is their total

    @classmethod
    def within(cls, first: NDArray[np.int64], n_tokens: int, block_size: int) -> Documents:
        """Find them in the first `n_tokens` tokens; DataError if every document is too short."""
        first = first[first < n_tokens]
        lengths = np.diff(first, append=n_tokens)
        ahead = np.append(0, np.cumsum(np.maximum(lengths - block_size, 0)))
        if not ahead[-1]:
            raise DataError(
                f"the longest document has {lengths.max()} tokens; --respect-documents needs one "
                f"of {block_size + 1}, a context and the token after it; lower --block-size"
            )
        return cls(first, ahead)

    @property
    def n_left_out(self) -> int:
        """Count the documents that are too short for a window and the token after it."""
        return int((np.diff(self.ahead) == 0).sum())

    def starts(self, random: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Draw `n` starts, each equally likely."""
        at = random.integers(0, self.ahead[-1], size=n)
        document = np.searchsorted(self.ahead, at, side="right") - 1
        return self.first[document] + at - self.ahead[document]
