"""What a sample has copied: the runs of characters that occur verbatim in a text.

The text streams by once, in blocks. A filter compares hashes of all windows of the block with those
of the sample; it passes too much, but never too little. What passes goes through a suffix automaton
of the sample, which is exact and takes constant time per character.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlx_randygpt.data.hashing import hash_windows
from mlx_randygpt.data.reading import Piece
from mlx_randygpt.state import Array
from mlx_randygpt.tokenizers.chars import code_points

MIN_RUN = 30  # characters: shorter runs occur by chance
BLOCK = 1 << 16  # characters hashed at a time; their hashes fit into a core's cache
FIRST_LOOK = 1 << 11  # characters that go through the automaton unfiltered
MAX_SEEN = 1 << 14  # regions remembered, so that text that repeats is looked at once
SLOT_BITS = 20  # of a hash: the size of the table that most windows are rejected by


class Span(NamedTuple):
    """The characters `start` to `stop` of a sample."""

    start: int
    stop: int


@dataclass(frozen=True)
class Copies:
    """The runs of a sample that occur verbatim in a text."""

    longest: Span  # a longest one; empty if not even one character occurs
    passages: tuple[Span, ...]  # of at least MIN_RUN characters and maximal; they can overlap
    share: float  # of the sample's characters that lie in passages

    @property
    def covered(self) -> tuple[Span, ...]:
        """Return the passages with those that overlap or touch joined."""
        return _union(self.passages)


def find_copies(samples: Sequence[str], text: Iterable[Piece]) -> list[Copies]:
    """Return for each sample which of its runs occur in a document of the text; exact.

    Memory is bounded by the samples, time is linear in the text.
    """
    finders = [Finder(sample) for sample in samples]
    letters = set().union(*samples)
    separator = next(chr(code) for code in range(len(letters) + 1) if chr(code) not in letters)
    carried = ""  # the end of the last block, where a run can begin that goes on
    for new in _blocks(text, separator):
        windows = Windows(carried + new)
        for finder in finders:
            finder.search(windows)
        n_carried = max([MIN_RUN - 1, *(finder.longest for finder in finders)])
        carried = windows.text[-n_carried:]
    return [finder.copies() for finder in finders]


def _blocks(text: Iterable[Piece], separator: str) -> Iterator[str]:
    """Yield the pieces in blocks of at least BLOCK characters, a separator before documents."""
    parts, size = list[str](), 0
    for piece in text:
        parts += [separator] * piece.begins + [piece.text]
        size += len(piece.text) + piece.begins
        if size >= BLOCK:
            yield "".join(parts)
            parts, size = [], 0
    if parts:
        yield "".join(parts)


class Windows:
    """A text and the hashes of its windows of each length that was asked for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._codes: Array = code_points(text).astype(np.uint32)
        self._hashes: dict[int, Array] = {}

    def hashes(self, length: int) -> Array:
        """Return a uint32 hash of each window of that length, (len(text) - length + 1,)."""
        if length not in self._hashes:
            self._hashes[length] = hash_windows(self._codes, length)
        return self._hashes[length]


class Finder:
    """Finds the runs of one sample in a text that comes in blocks."""

    def __init__(self, sample: str) -> None:
        self._automaton = SuffixAutomaton(sample)
        self._sample = Windows(sample)
        self._n = 0  # length of the windows in the filter
        self._hashes: Array = np.empty(0, np.uint32)  # sorted
        self._slots: Array = np.empty(0, np.bool_)
        self._seen: set[str] = set()

    @property
    def longest(self) -> int:
        """Return the length of the longest run so far."""
        return self._automaton.longest

    def search(self, windows: Windows) -> None:
        """Find every run of at least MIN_RUN characters, and any that is longer than all before."""
        if not self.longest:
            self._automaton.match(windows.text[:FIRST_LOOK])
        n = min(MIN_RUN, self.longest + 1)
        if n > min(len(self._sample.text), len(windows.text)):
            return
        hits = self._hits(windows, n)
        if not len(hits):
            return
        bounds = [0, *(np.flatnonzero(np.diff(hits) > 1) + 1).tolist(), len(hits)]
        for first, end in pairwise(bounds):
            region = windows.text[hits[first] : hits[end - 1] + n]
            if region not in self._seen:
                if len(self._seen) >= MAX_SEEN:
                    self._seen.clear()
                self._seen.add(region)
                self._automaton.match(region)

    def _hits(self, windows: Windows, n: int) -> Array:
        """Return where windows of n characters begin whose hash is that of one in the sample."""
        if n != self._n:
            self._n, self._hashes = n, np.unique(self._sample.hashes(n))
            self._slots = np.zeros(1 << SLOT_BITS, np.bool_)
            self._slots[self._hashes >> (32 - SLOT_BITS)] = True
        hashes = windows.hashes(n)
        hits = np.flatnonzero(self._slots[hashes >> (32 - SLOT_BITS)])
        return hits[np.isin(hashes[hits], self._hashes)]

    def copies(self) -> Copies:
        """Return what was found."""
        ends = self._automaton.run_lengths()  # of the runs that end before each position
        runs = [Span(stop - n, stop) for stop, n in enumerate(ends)]
        longest = max(runs, key=lambda run: run.stop - run.start)
        passages = tuple(
            run
            for run, after in zip(runs, [*runs[1:], None], strict=True)
            if run.stop - run.start >= MIN_RUN and (after is None or after.start > run.start)
        )
        n_covered = sum(stop - start for start, stop in _union(passages))
        return Copies(longest, passages, n_covered / max(1, len(ends) - 1))


class SuffixAutomaton:
    """The smallest automaton that accepts the suffixes of a text (Blumer et al., 1985).

    A state stands for substrings that end at the same positions, its link for the longest suffix
    of them that also ends elsewhere. State 0 is the empty string.
    """

    def __init__(self, text: str) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._link, self._length = [-1], [0]
        self._prefixes = [0]  # the state of each prefix of the text
        for char in text:
            self._prefixes.append(self._append(char, self._prefixes[-1]))
        self._matched = [0] * len(self._next)  # the longest match that ended in each state
        self.longest = 0

    def _append(self, char: str, last: int) -> int:
        """Add a character after the prefix of state `last`; return the state of the new prefix."""
        new = self._add(self._length[last] + 1, {}, 0)
        state = last
        while state >= 0 and char not in self._next[state]:
            self._next[state][char] = new
            state = self._link[state]
        if state < 0:
            return new
        target = self._next[state][char]
        if self._length[target] != self._length[state] + 1:  # split off the shorter strings
            link = self._link[target]
            split = self._add(self._length[state] + 1, dict(self._next[target]), link)
            self._link[target] = split
            while state >= 0 and self._next[state].get(char) == target:
                self._next[state][char] = split
                state = self._link[state]
            target = split
        self._link[new] = target
        return new

    def _add(self, length: int, after: dict[str, int], link: int) -> int:
        self._next.append(after)
        self._length.append(length)
        self._link.append(link)
        return len(self._next) - 1

    def match(self, text: str) -> None:
        """Record the longest match that ends at each character of another text."""
        following, link, length, matched = self._next, self._link, self._length, self._matched
        state = n = 0
        for char in text:
            while (target := following[state].get(char)) is None and state:
                state = link[state]
                n = length[state]
            if target is None:
                continue
            state, n = target, n + 1
            if n > matched[state]:
                matched[state] = n
        self.longest = max(self.longest, max(matched))

    def run_lengths(self) -> list[int]:
        """Return the longest match that ends before each position of the text, and at its end."""
        order = sorted(range(1, len(self._next)), key=self._length.__getitem__)
        matched, link = [*self._matched], self._link
        for state in reversed(order):  # a match includes its suffixes
            if matched[state]:
                matched[link[state]] = self._length[link[state]]
        for state in order:  # a suffix that matched is a match wherever it ends
            matched[state] = max(matched[state], matched[link[state]])
        return [matched[state] for state in self._prefixes]


def _union(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Join spans that overlap or touch; they are sorted."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.start <= joined[-1].stop:
            joined[-1] = Span(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return tuple(joined)
