"""The audit of a text: scripts, lost characters, copies, leaks into validation, repeated lines.

The text streams by a few times, and memory is bounded: a few numbers per document, a table of
lines, and two of hashes of windows. Of a long text those windows are compared whose hash begins
with zeros, an even sample. Lengths are in characters, so where a tokenizer joins them the split can
differ a little.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data.hashing import hash_windows
from mlx_randygpt.data.reading import Piece
from mlx_randygpt.data.split import (
    Split,
    conversation_cuts,
    conversations_last,
    copies_together,
    document_cuts,
    parts_split,
    tail_split,
    train_tokens,
)
from mlx_randygpt.data.vocabulary import Choice
from mlx_randygpt.tokenizers.chars import CODE_POINTS, SURROGATES, code_points

WINDOW = 50  # characters: a shorter passage that occurs twice is not reported
MAX_WINDOWS = 1 << 22  # compared in each table
BLOCK = 1 << 18  # characters that documents are joined to
HASHED = 1 << 15  # windows hashed at a time; their hashes fit into a core's cache
SLOT_BITS = 24  # of a hash: the size of the table that most windows are rejected by
BETWEEN = "\0"  # stands between documents; no text holds it
N_SHOWN = 5  # passages, lines, scripts and copies
EXCERPT = 60  # characters of a passage
MIN_LINE, MAX_LINE = 20, 200  # characters of a line that counts as boilerplate
MIN_TIMES = 10  # that it occurs
MAX_LINES = 1 << 16  # different lines counted at a time
FRAME = 2  # tokens around a document
Array = NDArray[Any]
Numbers = NDArray[np.int64]
Select = Callable[[Array], Array]  # from hashes to the indices of some
Source = Callable[[], Iterable[tuple[int, Piece]]]  # reads the text: number of the file, and piece


class Passage(NamedTuple):
    """A passage of the validation text that is in the training text too."""

    file: int
    document: int
    start: int  # character of the document
    length: int  # characters
    text: str  # its beginning


class Copy(NamedTuple):
    """A document that occurs several times."""

    times: int
    files: tuple[int, ...]  # of the first N_SHOWN


@dataclass(frozen=True)
class Audit:
    """What is in a text."""

    n_files: int
    n_documents: int
    n_conversations: int  # of these
    n_characters: int
    n_bytes: int  # in UTF-8
    scripts: dict[str, float]  # shares of the letters, largest first
    n_replacements: int  # U+FFFD and lone surrogates: what was once read or cut wrongly
    choice: Choice  # of the tokenizer
    copies: tuple[Copy, ...]  # the most frequent
    n_copies: int  # documents that have occurred before
    copied: float  # share of the text in them
    repeated: float  # share of the windows of other documents that have occurred before
    leaked: float  # share of the validation text that is in the training text
    leaks: tuple[Passage, ...]  # the longest
    n_leaks: int
    lines: tuple[tuple[str, int], ...]  # the most frequent, with how often they occur at least
    n_lines: int
    split: Split
    sampled: int  # one window of so many was compared, for leaks
    sampled_repeats: int  # and for what is repeated


def audit(source: Source, keeps_copies: bool = True) -> Audit:
    """Audit the text that each call of `source` reads from its beginning.

    `keeps_copies` is the rule of its split: copies of a document are on one side.
    """
    census = Census()
    for file, piece in source():
        census.read(file, piece)
    plan = _plan(census, keeps_copies)
    leaks, repeats = _compare(source, plan)
    passages = sorted(leaks.passages(), key=lambda passage: -passage.length)
    shown = _excerpts(source, [_locate(passage, plan, census) for passage in passages[:N_SHOWN]])
    lines = census.lines.frequent()
    return Audit(
        n_files=census.files[-1] + 1 if census.files else 0,
        n_documents=len(census.files),
        n_conversations=sum(census.talks),
        n_characters=sum(census.lengths),
        n_bytes=census.n_bytes,
        scripts=count_scripts(census.counts),
        n_replacements=int(
            census.counts[0xFFFD] + census.counts[SURROGATES.start : SURROGATES.stop].sum()
        ),
        choice=Choice.by_counts(census.counts),
        copies=_most_copied(census),
        n_copies=int(plan.is_copy.sum()),
        copied=int(plan.lengths[plan.is_copy].sum()) / max(1, sum(census.lengths)),
        repeated=repeats.share_repeated(),
        leaked=leaks.share_found(),
        leaks=tuple(shown),
        n_leaks=len(passages),
        lines=tuple(lines[:N_SHOWN]),
        n_lines=len(lines),
        split=plan.split,
        sampled=1 << leaks.bits,
        sampled_repeats=1 << repeats.bits,
    )


class Census:
    """What one pass over the text counts."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(CODE_POINTS, np.int64)
        self.digests, self.lengths = array("Q"), array("q")  # of each document
        self.files = array("q")  # of each document
        self.talks = array("b")  # of each document: 1 for a conversation
        self.n_bytes = 0
        self.lines = Lines()
        self._digest: Any = sha256()
        self._length = 0
        self._waiting = ""  # the beginning of a line
        self._small, self._n_small = list[str](), 0  # texts that are to be counted

    def read(self, file: int, piece: Piece) -> None:
        """Count one more piece."""
        text = piece.text
        if piece.begins:
            self._digest, self._length, self._waiting = sha256(), 0, ""
            self.talks.append(piece.role != "")
        self._digest.update(piece.identity)
        self._length += len(text)
        self.n_bytes += len(text.encode("utf-8", "surrogatepass"))
        self._count(text)
        whole = (self._waiting + text).split("\n")
        self._waiting = "" if piece.ends or piece.role else whole.pop()[: MAX_LINE + 1]
        self.lines.add(whole)
        if piece.ends:
            self.digests.append(int.from_bytes(self._digest.digest()[:8], "little"))
            self.lengths.append(self._length)
            self.files.append(file)

    def _count(self, text: str) -> None:
        self._small.append(text)
        self._n_small += len(text)
        if self._n_small >= BLOCK:
            self.finish()

    def finish(self) -> None:
        """Count the characters that wait; counting with NumPy has a cost per call."""
        counts = np.bincount(code_points("".join(self._small)))
        self.counts[: len(counts)] += counts
        self._small, self._n_small = [], 0


class Lines:
    """The frequent lines of a text (lossy counting, after Manku and Motwani, 2002)."""

    def __init__(self, most: int = MAX_LINES) -> None:
        self._counts: Counter[str] = Counter()
        self._most, self._lost = most, 0

    def add(self, lines: Iterable[str]) -> None:
        """Count lines; beyond the size of the table the rarest are dropped."""
        self._counts.update(
            [line for line in lines if MIN_LINE <= len(line) <= MAX_LINE and not line.isspace()]
        )
        while len(self._counts) > self._most:
            self._lost += 1
            rest = {line: n - 1 for line, n in self._counts.items() if n > 1}
            self._counts = Counter(rest)

    def frequent(self) -> list[tuple[str, int]]:
        """Return the lines that occur MIN_TIMES or more, and how often at least."""
        rows = [(line, n) for line, n in self._counts.items() if n >= MIN_TIMES]
        return sorted(rows, key=lambda row: (-row[1], row[0]))


class Plan(NamedTuple):
    """Where each document lies and is cut, in characters."""

    starts: Numbers  # (D,)
    lengths: Numbers  # (D,)
    cuts: Numbers  # (D,), from the beginning of the document
    is_copy: NDArray[np.bool_]  # (D,): occurs before
    split: Split


def _plan(census: Census, keeps_copies: bool) -> Plan:
    census.finish()
    lengths = np.asarray(census.lengths, np.int64)
    ends = np.cumsum(lengths + FRAME)
    starts, n = ends - lengths - FRAME, int(ends[-1]) if len(ends) else 0
    digests = np.asarray(census.digests, np.uint64)
    talks = np.asarray(census.talks, np.bool_)
    cuts = document_cuts(digests, starts, n) if keeps_copies else None
    parts = copies_together(digests, starts, n) if keeps_copies else None
    if talks.any():
        cuts = conversation_cuts(digests, starts, talks, n)
        parts = conversations_last(digests, starts, talks, n)
    file_starts = starts[np.unique(np.asarray(census.files, np.int64), return_index=True)[1]]
    split = (
        tail_split(file_starts.tolist(), n)
        if parts is None
        else parts_split(parts, file_starts.tolist(), n)
    )
    if cuts is None:
        cuts = np.clip(np.full(len(starts), train_tokens(n)), starts, ends)
    is_copy = np.ones(len(digests), np.bool_)
    is_copy[np.unique(digests, return_index=True)[1]] = False
    characters = np.cumsum(lengths) - lengths
    return Plan(characters, lengths, np.clip(cuts - starts - 1, 0, lengths), is_copy, split)


class Windows(NamedTuple):
    """Windows of a block that lie in one document each."""

    hashes: Array  # uint64
    positions: Numbers  # characters of the whole text
    is_train: NDArray[np.bool_]
    is_val: NDArray[np.bool_]


def _windows(
    pieces: Iterable[Piece], plan: Plan, is_wanted: NDArray[np.bool_], select: Select
) -> Iterator[Windows]:
    """Yield the windows of the documents that are wanted, (D,), whose hashes are selected."""
    parts, places, size = list[str](), list[tuple[int, int, int]](), 0
    document, offset, before = -1, 0, ""
    for piece in pieces:
        if piece.begins:
            document, offset, before = document + 1, 0, ""
        if is_wanted[document]:
            text = before + piece.text
            places.append((size, document, offset - len(before)))
            parts += [text, BETWEEN]
            size += len(text) + 1
            before = text[1 - WINDOW :]
        offset += len(piece.text)
        if size >= BLOCK:
            yield _hash("".join(parts), np.array(places), plan, select)
            parts, places, size = [], [], 0
    if size > WINDOW:
        yield _hash("".join(parts), np.array(places), plan, select)


def _hash(text: str, places: Numbers, plan: Plan, select: Select) -> Windows:
    codes, selected, places_of = code_points(text), list[Array](), list[Numbers]()
    for start in range(0, len(codes) - WINDOW + 1, HASHED):
        hashes = hash_windows(codes[start : start + HASHED + WINDOW - 1].astype(np.uint64), WINDOW)
        at = select(hashes)
        selected.append(hashes[at])
        places_of.append(at + start)
    hashes, at = np.concatenate(selected), np.concatenate(places_of)
    part = np.searchsorted(places[:, 0], at, side="right") - 1
    ends = np.append(places[1:, 0], len(text)) - 1  # without the character between
    inside = at + WINDOW <= ends[part]
    hashes, at, part = hashes[inside], at[inside], part[inside]
    document = places[part, 1]
    offsets = places[part, 2] + at - places[part, 0]
    cuts = plan.cuts[document]
    return Windows(
        hashes, plan.starts[document] + offsets, offsets + WINDOW <= cuts, offsets >= cuts
    )


class Leaks:
    """The windows of the validation text, and which of them are in the training text."""

    def __init__(self, windows: Iterable[Windows], plan: Plan, bits: int) -> None:
        rows = [(w.hashes[w.is_val], w.positions[w.is_val]) for w in windows]
        hashes = np.concatenate([np.empty(0, np.uint64), *(row[0] for row in rows)])
        self._positions = np.concatenate([np.empty(0, np.int64), *(row[1] for row in rows)])
        self._hashes, self._inverse = np.unique(hashes, return_inverse=True)
        self._found = np.zeros(len(self._hashes), np.bool_)
        self._slots = np.zeros(1 << SLOT_BITS, np.bool_)
        self._slots[self._slot(self._hashes)] = True
        self._plan, self.bits = plan, bits

    def _slot(self, hashes: Array) -> Array:
        """Return a table index; the highest bits may all be zero, so the next ones are taken."""
        return (hashes >> np.uint64(16)) & np.uint64((1 << SLOT_BITS) - 1)

    def can_hold(self, hashes: Array) -> Array:
        """Return whether each hash can be one of the validation text: all of it, and some more."""
        return np.asarray(self._slots[self._slot(hashes)])

    def search(self, windows: Windows) -> None:
        """Look for the windows of training text."""
        hashes = np.sort(windows.hashes[windows.is_train])  # neighbours are found in a cache
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        if len(self._hashes):
            self._found[at[self._hashes[at] == hashes]] = True

    def passages(self) -> list[Passage]:
        """Return the runs of windows that were found, with the place in the whole text."""
        found = self._found[self._inverse]
        document = np.searchsorted(self._plan.starts, self._positions, side="right")
        apart = np.append(True, document[1:] != document[:-1])[: len(found)]
        if not self.bits:
            apart |= np.append(True, np.diff(self._positions) > 1)[: len(found)]
        begins = found & (apart | ~np.append(False, found[:-1])[: len(found)])
        ends = found & (np.append(apart[1:], True) | ~np.append(found[1:], False))[: len(found)]
        first, last = self._positions[begins].tolist(), self._positions[ends].tolist()
        return [Passage(0, 0, a, b - a + WINDOW, "") for a, b in zip(first, last, strict=True)]

    def share_found(self) -> float:
        """Return the share of the validation text in passages; of a sample, that of windows."""
        if self.bits:
            return float(self._found[self._inverse].sum() / max(1, len(self._inverse)))
        n_val = int((self._plan.lengths - self._plan.cuts)[~self._plan.is_copy].sum())
        covered, end = 0, 0
        for passage in self.passages():
            covered += passage.start + passage.length - max(end, passage.start)
            end = passage.start + passage.length
        return covered / max(1, n_val)


class Repeats:
    """The windows of the whole text, and how many have occurred before."""

    def __init__(self, bits: int) -> None:
        self._rows: list[Array] = []
        self.bits = bits

    def add(self, windows: Windows) -> None:
        """Keep the windows of the sample."""
        self._rows.append(windows.hashes[begin_with_zeros(windows.hashes, self.bits)])

    def share_repeated(self) -> float:
        """Return the share of the windows that have occurred before."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self._rows])
        hashes.sort()
        return float((hashes[1:] == hashes[:-1]).sum() / max(1, len(hashes)))


def _compare(source: Source, plan: Plan) -> tuple[Leaks, Repeats]:
    """Compare the windows of the validation text with the training text, and all with all."""
    n_val = int((plan.lengths - plan.cuts).sum())
    bits, more_bits = sampling_bits(n_val), sampling_bits(int(plan.lengths.sum()))

    def pieces() -> Iterator[Piece]:
        return (piece for _, piece in source())

    def in_sample(hashes: Array) -> Array:
        return np.flatnonzero(begin_with_zeros(hashes, bits))

    def possible(hashes: Array) -> Array:
        at = in_sample(hashes)
        return at[leaks.can_hold(hashes[at]) | begin_with_zeros(hashes[at], more_bits)]

    has_val = plan.cuts < plan.lengths
    leaks = Leaks(_windows(pieces(), plan, ~plan.is_copy & has_val, in_sample), plan, bits)
    repeats = Repeats(more_bits)
    for windows in _windows(pieces(), plan, ~plan.is_copy, possible):
        leaks.search(windows)
        repeats.add(windows)
    return leaks, repeats


def begin_with_zeros(hashes: Array, bits: int) -> Array:
    """Return whether each hash begins with so many zeros."""
    return np.asarray(hashes <= np.uint64((1 << (64 - bits)) - 1))


def sampling_bits(n: int) -> int:
    """Return how many zeros a hash begins with so that MAX_WINDOWS of `n` are left at most."""
    return max(0, -(-n // MAX_WINDOWS) - 1).bit_length()


def _locate(passage: Passage, plan: Plan, census: Census) -> Passage:
    document = int(np.searchsorted(plan.starts, passage.start, side="right")) - 1
    start = passage.start - int(plan.starts[document])
    return passage._replace(file=census.files[document], document=document, start=start)


def _excerpts(source: Source, passages: list[Passage]) -> Iterator[Passage]:
    """Return the passages with the beginning of their text, which is read once more."""
    texts = dict.fromkeys(passages, "")
    document, offset = -1, 0
    for _, piece in source() if passages else ():
        document, offset = (document + 1, 0) if piece.begins else (document, offset)
        for passage in passages:
            n = min(EXCERPT, passage.length) - len(texts[passage])
            at = passage.start + len(texts[passage]) - offset
            if document == passage.document and n > 0 and 0 <= at < len(piece.text):
                texts[passage] += piece.text[at : at + n]
        offset += len(piece.text)
    return (passage._replace(text=text) for passage, text in texts.items())


def _most_copied(census: Census) -> tuple[Copy, ...]:
    digests, files = np.asarray(census.digests, np.uint64), np.asarray(census.files, np.int64)
    values, first, times = np.unique(digests, return_index=True, return_counts=True)
    often = np.lexsort((first, -times))[:N_SHOWN]
    return tuple(
        Copy(int(times[i]), tuple(files[digests == values[i]][:N_SHOWN].tolist()))
        for i in often
        if times[i] > 1
    )


def count_scripts(counts: NDArray[np.int64]) -> dict[str, float]:
    """Return the share of each script among the counted letters, largest first."""
    scripts: Counter[str] = Counter()
    for code in np.flatnonzero(counts).tolist():
        if chr(code).isalpha():
            scripts[_script(chr(code))] += int(counts[code])
    total = sum(scripts.values())
    return {script: n / total for script, n in scripts.most_common()}


def _script(letter: str) -> str:
    """Return the first word of a letter's name, which is its script: Latin, Cyrillic, CJK."""
    word = unicodedata.name(letter, "OTHER").split()[0]
    return word if word == "CJK" else word.capitalize()
