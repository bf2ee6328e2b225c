"""The split of a text: which of its tokens are for training, and which for validation.

The last tenth is for validation. If copies of a document would be on both sides of that cut, the
documents are put into another order first, so that all copies are on one side. If there are
conversations, about a tenth of them is for validation, whole ones, and all other text for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data.token_file import TokenFile

TRAIN_SHARE = 0.9
BLOCK_TOKENS = 1 << 20  # copied at a time
N_FILES = 3  # named in a line
Array = NDArray[Any]
Numbers = NDArray[np.int64]


def train_tokens(n: int) -> int:
    """Return how many of `n` tokens are for training."""
    return int(TRAIN_SHARE * n)


@dataclass(frozen=True)
class Split:
    """How many tokens of each file are for validation, and why these."""

    n_tokens: tuple[int, ...]  # of each file
    n_val: tuple[int, ...]  # of them for validation
    at_end: tuple[bool, ...]  # whether these are the last of the file
    n_copies: int = 0  # documents that occur more than once, if the split keeps them on one side

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Split:
        """Return the split from its fields, with lists for tuples."""
        return cls(
            n_tokens=tuple(values["n_tokens"]),
            n_val=tuple(values["n_val"]),
            at_end=tuple(values["at_end"]),
            n_copies=values["n_copies"],
        )

    @property
    def n_train(self) -> int:
        """Return the number of training tokens."""
        return sum(self.n_tokens) - sum(self.n_val)

    def describe(self, names: Sequence[str]) -> str:
        """Return which files, with these names, form the validation text: `the last 10 % of a.txt`.

        The names are shortened to what tells them apart.
        """
        rows = zip(_short(names), self.n_tokens, self.n_val, self.at_end, strict=True)
        parts = [_describe_file(*row) for row in rows if row[2]]
        more = len(parts) - N_FILES
        if more > 0:
            parts[N_FILES:] = [f"{more:,} more file{'s' if more > 1 else ''}, in whole or in part"]
        return " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


class Parts(NamedTuple):
    """Parts of a text in their new order, those for training first; each is of one document."""

    starts: Numbers
    ends: Numbers
    n_train: int  # tokens
    n_copies: int  # documents that occur more than once, if these have decided the order

    @property
    def new_starts(self) -> Numbers:
        """Return where each part begins in the new order."""
        lengths = self.ends - self.starts
        return np.asarray(np.cumsum(lengths) - lengths, np.int64)

    @property
    def moves(self) -> bool:
        """Return whether the blocks are in another order than in the text."""
        return bool((self.starts[1:] < self.starts[:-1]).any())

    def blocks(self, tokens: Array | TokenFile) -> Iterator[Array]:
        """Yield the tokens in the new order, some at a time."""
        joined = np.append(self.starts[1:] != self.ends[:-1], True)  # ends of runs that adjoin
        firsts = self.starts[np.append(True, joined[:-1])]
        for first, end in zip(firsts.tolist(), self.ends[joined].tolist(), strict=True):
            for start in range(first, end, BLOCK_TOKENS):
                yield np.asarray(tokens[start : min(end, start + BLOCK_TOKENS)])


def tail_split(file_starts: Sequence[int], n: int, n_train: int | None = None) -> Split:
    """Return the split of `n` tokens at `n_train`, by default nine tenths, without moving any."""
    n_train = train_tokens(n) if n_train is None else n_train
    ends = np.append(np.asarray(file_starts, np.int64), n)
    n_val = np.diff(np.maximum(ends - n_train, 0))
    at_end = (True,) * len(n_val)
    return Split(tuple(np.diff(ends).tolist()), tuple(n_val.tolist()), at_end)


def document_cuts(digests: Array, starts: Numbers, n: int) -> Numbers | None:
    """Return where each document of `n` tokens is cut so that no copy is on both sides, (D,).

    `digests` are equal for copies, (D,), and `starts` are where documents begin. Documents that
    occur more than once come first. The different ones are cut at nine tenths, and each copy where
    its first is. None: no document has copies on both sides of the plain cut.
    """
    cut, ends = train_tokens(n), np.append(starts[1:], n)
    _, first, inverse, counts = np.unique(
        digests, return_index=True, return_inverse=True, return_counts=True
    )
    is_before = np.bincount(inverse[starts < cut], minlength=len(first)) > 0
    is_after = np.bincount(inverse[ends > cut], minlength=len(first)) > 0
    if not (is_before & is_after & (counts > 1)).any():
        return None
    lengths = ends - starts
    order = np.lexsort((first, counts == 1))  # of the different documents
    behind = np.cumsum(lengths[first[order]])
    n_train = np.empty(len(first), np.int64)
    n_train[order] = train_tokens(int(behind[-1])) - behind + lengths[first[order]]
    return np.asarray(starts + np.clip(n_train[inverse], 0, lengths), np.int64)


def conversation_cuts(digests: Array, starts: Numbers, talks: Array, n: int) -> Numbers:
    """Return where each document of `n` tokens is cut if some are conversations, (D,).

    `talks` (D,) is true for these. None is cut inside: the last are for validation, about a tenth
    of the tokens of the different ones, after those that occur more than once, whose copies are on
    the side of the first. All other documents are for training.
    """
    ends = np.append(starts[1:], n)
    cuts, talks = ends.copy(), np.flatnonzero(talks)
    _, first, inverse, counts = np.unique(
        digests[talks], return_index=True, return_inverse=True, return_counts=True
    )
    order = np.lexsort((first, counts == 1))  # of the different conversations
    behind = np.cumsum((ends - starts)[talks[first[order]]])
    is_val = np.empty(len(first), np.bool_)
    is_val[order] = behind > train_tokens(int(behind[-1]))
    is_val[order[0]] = False
    held = talks[is_val[inverse]]
    cuts[held] = starts[held]
    return cuts


def copies_together(digests: Array, starts: Numbers, n: int) -> Parts | None:
    """Return the order of `n` tokens that has the training parts of all documents first."""
    cuts = document_cuts(digests, starts, n)
    if cuts is None:
        return None
    n_copies = len(digests) - int((np.unique(digests, return_counts=True)[1] == 1).sum())
    return _parts(cuts, starts, n, n_copies)


def conversations_last(digests: Array, starts: Numbers, talks: Array, n: int) -> Parts:
    """Return the order of `n` tokens that has the conversations for validation last."""
    return _parts(conversation_cuts(digests, starts, talks, n), starts, n, 0)


def _parts(cuts: Numbers, starts: Numbers, n: int, n_copies: int) -> Parts:
    ends = np.append(starts[1:], n)
    in_train, in_val = cuts > starts, cuts < ends
    return Parts(
        np.append(starts[in_train], cuts[in_val]),
        np.append(cuts[in_train], ends[in_val]),
        int((cuts - starts).sum()),
        n_copies,
    )


def parts_split(parts: Parts, file_starts: Sequence[int], n: int) -> Split:
    """Return the split of `n` tokens whose files begin at `file_starts`."""
    bounds = np.append(np.asarray(file_starts, np.int64), n)
    is_val = parts.new_starts >= parts.n_train
    file = np.searchsorted(bounds, parts.starts[is_val], side="right") - 1
    n_val = np.zeros(len(file_starts), np.int64)
    np.add.at(n_val, file, (parts.ends - parts.starts)[is_val])
    first = bounds[1:].copy()  # token for validation
    np.minimum.at(first, file, parts.starts[is_val])
    return Split(
        tuple(np.diff(bounds).tolist()),
        tuple(n_val.tolist()),
        tuple((bounds[1:] - first == n_val).tolist()),
        parts.n_copies,
    )


def _describe_file(name: str, n_tokens: int, n_val: int, at_end: bool) -> str:
    if n_val == n_tokens:
        return f"all of {name}"
    return f"{'the last ' * at_end}{100 * n_val / n_tokens:.3g} % of {name}"


def _short(names: Sequence[str]) -> list[str]:
    """Return the names of files without their folders, unless two would be the same."""
    short = [Path(name).name or name for name in names]
    return short if len({*short}) == len(short) else [*names]
