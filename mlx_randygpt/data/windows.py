"""Windows of tokens: random ones for training, consecutive ones for evaluation.

The windows depend on the arguments only, so a resumed run sees the same ones.

Legend: B batch, T block_size, n tokens of the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError
from mlx_randygpt.state import Batch, Tokens, rng


class Drawn(NamedTuple):
    """Windows that were drawn, as a Batch takes them."""

    starts: NDArray[np.int64]  # (B,)
    ends: NDArray[np.int64] | None  # (B,) past the last token; None: after T + 1 tokens


class Windows(Protocol):
    """A rule by which training windows are drawn."""

    def draw(self, random: np.random.Generator, n: int) -> Drawn:
        """Draw `n` windows."""


def sample_batch(
    tokens: Tokens,
    batch_size: int,
    block_size: int,
    seed: int,
    step: int,
    micro: int = 0,
    windows: Windows | None = None,
) -> Batch:
    """Draw B windows from `tokens` (n,), by the rule of `windows` if there is one.

    Without one, each start with room for T + 1 tokens is equally likely.
    """
    random = rng(seed, "batch", step, micro)
    if windows is not None:
        starts, ends = windows.draw(random, batch_size)
        return Batch(tokens, starts, block_size, ends=ends)
    assert len(tokens) > block_size, "check_length runs first"
    last = len(tokens) - block_size - 1
    return Batch(tokens, random.integers(0, last, size=batch_size, endpoint=True), block_size)


def eval_batches(
    tokens: Tokens,
    block_size: int,
    batch_size: int,
    max_tokens: int | None = None,
    conversations: Conversations | None = None,
) -> Iterator[Batch]:
    """Yield non-overlapping windows in a fixed order; every token but the first is a target once.

    With `conversations`, the windows are theirs. `max_tokens` limits them to that many tokens, but
    at least one window, spread evenly. All batches have the same B, at most `batch_size`: the last
    is filled with windows past the end, whose targets do not count. Weight the loss of a batch by
    its `n_targets()`.
    """
    if len(tokens) < 2:
        raise DataError(f"{len(tokens)} tokens leave nothing to predict; give at least 2")
    n_windows = -(-(len(tokens) - 1) // block_size)
    if conversations is not None:
        n_windows = len(conversations.first)
    n_used = n_windows
    if max_tokens is not None:
        n_used = min(n_windows, max(1, max_tokens // block_size))
    chosen = np.arange(n_used, dtype=np.int64) * n_windows // n_used
    batch_size = min(batch_size, n_used)
    padding = np.full(-n_used % batch_size, len(tokens), dtype=np.int64)
    if conversations is None:
        for rows in np.concatenate([chosen * block_size, padding]).reshape(-1, batch_size):
            yield Batch(tokens, rows, block_size)
        return
    starts = np.concatenate([conversations.first[chosen], padding]).reshape(-1, batch_size)
    ends = np.concatenate([conversations.ends[chosen], padding]).reshape(-1, batch_size)
    for rows, ends_of_rows in zip(starts, ends, strict=True):
        yield Batch(tokens, rows, block_size, ends=ends_of_rows)


@dataclass(frozen=True, eq=False)
class Documents:
    """The starts at which a window and the token after it lie inside one document."""

    first: NDArray[np.int64]  # first token of each document
    ahead: NDArray[np.int64]  # starts in earlier documents; the last entry is their total

    @classmethod
    def within(cls, first: NDArray[np.int64], n_tokens: int, block_size: int) -> Documents:
        """Find them in the first `n_tokens` tokens; DataError if every document is too short."""
        first = first[first < n_tokens]
        return cls.of(first, np.diff(first, append=n_tokens), block_size)

    @classmethod
    def of(cls, first: NDArray[np.int64], lengths: NDArray[np.int64], block_size: int) -> Documents:
        """Find them in documents of these lengths; DataError if all of them are too short."""
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

    def draw(self, random: np.random.Generator, n: int) -> Drawn:
        """Draw `n` windows, each start equally likely."""
        at = random.integers(0, self.ahead[-1], size=n)
        document = np.searchsorted(self.ahead, at, side="right") - 1
        return Drawn(self.first[document] + at - self.ahead[document], None)


@dataclass(frozen=True, eq=False)
class Conversations:
    """Windows of conversations: each begins with a question, or where a longer one was cut."""

    first: NDArray[np.int64]  # (W,) first token of each window
    ends: NDArray[np.int64]  # (W,) past its last token
    n_conversations: int = 0  # that they are cut from
    n_long: int = 0  # of these, too long for one window

    def draw(self, random: np.random.Generator, n: int) -> Drawn:
        """Draw `n` windows, each equally likely."""
        at = random.integers(0, len(self.first), size=n)
        return Drawn(self.first[at], self.ends[at])


@dataclass(frozen=True, eq=False)
class Mixture:
    """Windows of several kinds, or of several texts, each with its share of the windows."""

    parts: Sequence[Windows]
    shares: NDArray[np.float64]  # (P,), with the sum 1
    block_size: int

    def draw(self, random: np.random.Generator, n: int) -> Drawn:
        """Draw `n` windows; first the part of each, then the windows part by part."""
        part = random.choice(len(self.parts), size=n, p=self.shares)
        starts, ends = np.empty(n, np.int64), np.empty(n, np.int64)
        for i, windows in enumerate(self.parts):
            rows = part == i
            starts[rows], drawn_ends = windows.draw(random, int(rows.sum()))
            plain = starts[rows] + self.block_size + 1
            ends[rows] = plain if drawn_ends is None else drawn_ends
        return Drawn(starts, ends)
