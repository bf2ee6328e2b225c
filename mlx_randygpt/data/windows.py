"""Choose windows of tokens: at random or in passes for training, one after another to evaluate.

The windows depend on the arguments only, so a resumed run sees the same ones. Nothing is kept
between steps: the order of a pass is a permutation that is computed for single numbers.

Legend: B batch, T block_size, n tokens of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError
from mlx_randygpt.data.hashing import hash_numbers
from mlx_randygpt.state import Batch, Tokens, rng

Rows = NDArray[np.bool_]  # (B,) which windows of a batch
_ROUND = 1 << 20  # windows in which each part of a mixture has its share
_FEISTEL_ROUNDS = 4
_USES = ("order", "shift")  # of random bits that a pass depends on
_ONE = np.uint64(1)


class Drawn(NamedTuple):
    """Windows that were drawn, as a Batch takes them."""

    starts: NDArray[np.int64]  # (B,)
    ends: NDArray[np.int64] | None  # (B,) past the last token; None: after T + 1 tokens


class Windows(Protocol):
    """The training windows of a text, which can be drawn at random or visited in passes."""

    def draw(self, random: np.random.Generator, n: int) -> Drawn:
        """Draw `n` windows independently of each other."""

    def visit(self, numbers: NDArray[np.int64], seed: int) -> Drawn:
        """Return the windows with these numbers, (B,), in an endless series of passes.

        A pass visits every window once, in an order of its own.
        """


def sample_batch(
    tokens: Tokens,
    batch_size: int,
    block_size: int,
    seed: int,
    step: int,
    micro: int = 0,
    windows: Windows | None = None,
) -> Batch:
    """Draw B windows of `tokens` (n,) at random, independently of each other.

    They are drawn from `windows`; if that is None, every start with room for T + 1 tokens is
    equally likely.
    """
    windows = windows or _anywhere(len(tokens), block_size)
    starts, ends = windows.draw(rng(seed, "batch", step, micro), batch_size)
    return Batch(tokens, starts, block_size, ends=ends)


def batch_of_passes(
    tokens: Tokens,
    batch_size: int,
    block_size: int,
    seed: int,
    first: int,
    windows: Windows | None = None,
) -> Batch:
    """Return the B windows of `tokens` (n,) that start at number `first` in a series of passes.

    Each pass reads every window of `windows` once, in random order; if that is None, it reads the
    whole text, cut at different places than in the pass before.
    """
    windows = windows or _anywhere(len(tokens), block_size)
    starts, ends = windows.visit(np.arange(first, first + batch_size, dtype=np.int64), seed)
    return Batch(tokens, starts, block_size, ends=ends)


@lru_cache(maxsize=8)  # each step asks for those of the same text
def _anywhere(n_tokens: int, block_size: int) -> Documents:
    assert n_tokens > block_size, "check_length runs first"
    return Documents.within(np.zeros(1, np.int64), n_tokens, block_size)


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
    """The windows that lie, with the token after them, inside one document."""

    first: NDArray[np.int64]  # (D,) first token of each document
    ahead: NDArray[np.int64]  # (D + 1,) starts in earlier documents; the last entry is their total
    block_size: int

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
        return cls(first, ahead, block_size)

    @property
    def n_left_out(self) -> int:
        """Count the documents that are too short for a window and the token after it."""
        return int((np.diff(self.ahead) == 0).sum())

    @cached_property
    def tiles(self) -> NDArray[np.int64]:
        """Return how many windows of a pass precede each document, then their total, (D + 1,)."""
        n_starts = np.diff(self.ahead)
        return np.append(0, np.cumsum(-(-n_starts // self.block_size)))

    def draw(self, random: np.random.Generator, n: int) -> Drawn:
        """Draw `n` windows, each start equally likely."""
        at = random.integers(0, self.ahead[-1], size=n)
        document = np.searchsorted(self.ahead, at, side="right") - 1
        return Drawn(self.first[document] + at - self.ahead[document], None)

    def visit(self, numbers: NDArray[np.int64], seed: int) -> Drawn:
        """Return the windows with these numbers, (B,).

        Each pass shifts all windows of a document by the same random number of tokens below T. A
        window that would then reach past an edge of the document is moved back to that edge.
        """
        size = self.block_size
        passes, tile = shuffle(numbers, int(self.tiles[-1]), seed)
        document = np.searchsorted(self.tiles, tile, side="right") - 1
        key = hash_numbers(passes.astype(np.uint64) + _random_bits(seed, "shift"))
        shift = hash_numbers(key + document.astype(np.uint64)) % np.uint64(size)
        n_starts = self.ahead[document + 1] - self.ahead[document]
        n_tiles = self.tiles[document + 1] - self.tiles[document]
        spare = n_tiles * size - n_starts  # half of it before the document, half behind it
        at = (tile - self.tiles[document]) * size + shift.astype(np.int64) - spare // 2
        return Drawn(self.first[document] + np.clip(at, 0, n_starts - 1), None)


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

    def visit(self, numbers: NDArray[np.int64], seed: int) -> Drawn:
        """Return the windows with these numbers, (B,)."""
        _, at = shuffle(numbers, len(self.first), seed)
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
        return self._collect(part, lambda i, rows: self.parts[i].draw(random, int(rows.sum())))

    def visit(self, numbers: NDArray[np.int64], seed: int) -> Drawn:
        """Return the windows with these numbers, (B,).

        Each part has its own passes, and its share of every `_ROUND` windows, in random order.
        """
        counts = np.maximum(1, np.round(self.shares * _ROUND)).astype(np.int64)
        ahead = np.append(0, np.cumsum(counts))
        rounds, slot = shuffle(numbers, int(ahead[-1]), seed)
        part = np.searchsorted(ahead, slot, side="right") - 1
        of_part = rounds * counts[part] + slot - ahead[part]
        return self._collect(part, lambda i, rows: self.parts[i].visit(of_part[rows], seed + i))

    def _collect(self, part: NDArray[np.int64], windows: Callable[[int, Rows], Drawn]) -> Drawn:
        """Return one window for each row of a batch, from the part that `part` (B,) names.

        `windows` is called with the number of a part and the rows that it has to fill.
        """
        starts, ends = np.empty(len(part), np.int64), np.empty(len(part), np.int64)
        for i in range(len(self.parts)):
            rows = part == i
            starts[rows], drawn_ends = windows(i, rows)
            plain = starts[rows] + self.block_size + 1
            ends[rows] = plain if drawn_ends is None else drawn_ends
        return Drawn(starts, ends)


def shuffle(
    numbers: NDArray[np.int64], n_items: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pass and the item (0 to n_items − 1) of each number, both (B,).

    Number i belongs to pass i // n_items. The seed and the number of the pass determine the order
    of its items: a Feistel network of `_FEISTEL_ROUNDS` rounds (Luby & Rackoff 1988) permutes all
    numbers of as many bits as n_items − 1 has, and is applied again while the result is no item.
    """
    passes, x = np.divmod(numbers, n_items)
    n_bits = max(2, (n_items - 1).bit_length())
    halves = [np.uint64(n_bits // 2), np.uint64(n_bits - n_bits // 2)]  # they change places
    key = hash_numbers(passes.astype(np.uint64) + _random_bits(seed, "order"))
    keys = [hash_numbers(key + np.uint64(i)) for i in range(_FEISTEL_ROUNDS)]
    items = x.astype(np.uint64)
    rows = np.arange(len(items))
    while len(rows):
        part = items[rows]
        for i, key in enumerate(keys):
            upper, lower = halves[i % 2], halves[1 - i % 2]
            right = part & ((_ONE << lower) - _ONE)
            left = part >> lower ^ hash_numbers(key[rows] + right) & ((_ONE << upper) - _ONE)
            part = right << upper | left
        items[rows] = part
        rows = rows[items[rows] >= n_items]
    return passes, items.astype(np.int64)


@lru_cache
def _random_bits(seed: int, use: str) -> np.uint64:
    return rng(seed, "batch", _USES.index(use)).integers(1 << 64, dtype=np.uint64)
