"""Encoding: pieces of text become blocks of tokens, on several threads and in order.

If the tokenizer has a token that ends a text, a text becomes BOS text EOS. A conversation becomes
its rendered turns; tokens that are only read are stored as their complement.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data.reading import MAX_PIECE, Piece
from mlx_randygpt.dialogue import frame
from mlx_randygpt.tokenizers import NO_TOKEN, Tokenizer

Ids = NDArray[np.int32]


@dataclass
class TextStats:
    """Statistics of a text, complete once all of its blocks were yielded."""

    characters: int = 0
    n_bytes: int = 0  # of the text in UTF-8
    unknown: Counter[str] = field(default_factory=Counter)  # characters that were dropped
    digest: Any = field(default_factory=sha256)  # of the documents in UTF-8, a NUL between them
    n_tokens: int = 0
    starts: array[int] = field(default_factory=lambda: array("q"))  # where documents begin
    files: array[int] = field(default_factory=lambda: array("q"))  # first document of each file
    documents: array[int] = field(default_factory=lambda: array("Q"))  # a digest of each text
    talks: array[int] = field(default_factory=lambda: array("b"))  # 1 for a conversation
    n_skipped: int = 0  # rows that were left out
    first_skipped: str = ""  # what is wrong with the first of them
    _n_read: int = 0  # documents
    _document: Any = field(default_factory=sha256)  # the one that is being read

    def begin_file(self) -> None:
        """Count one more file; the pieces read from now on are of it."""
        self.files.append(self._n_read)

    def skip(self, problem: str) -> None:
        """Count one more row that is left out."""
        self.n_skipped += 1
        self.first_skipped = self.first_skipped or problem

    def read(self, piece: Piece) -> None:
        """Count one more piece."""
        between = b"\0" if piece.begins and self._n_read else b""
        self._n_read += piece.begins
        self.digest.update(between + piece.identity)
        if piece.begins:
            self._document = sha256()
            self.talks.append(piece.role != "")
        self._document.update(piece.identity)
        if piece.ends:
            self.documents.append(int.from_bytes(self._document.digest()[:8], "little"))
        self.characters += len(piece.text)
        self.n_bytes += len(piece.text.encode("utf-8", "surrogatepass"))


def blocks(
    pieces: Iterable[Piece], tokenizer: Tokenizer, stats: TextStats, threads: int = 1
) -> Iterator[Ids]:
    """Yield the tokens of the pieces in order, about 100,000 at a time, and update `stats`.

    Only a small part of the text is in memory at a time.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[tuple[Ids, list[int], dict[str, int]]]] = deque()
    try:
        for job in _group(pieces, stats):
            waiting.append(pool.submit(_encode, job, tokenizer))
            if len(waiting) > threads + 1:
                yield _count_block(waiting.popleft().result(), stats)
        while waiting:
            yield _count_block(waiting.popleft().result(), stats)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, only the jobs in progress are awaited


def _group(pieces: Iterable[Piece], stats: TextStats) -> Iterator[list[Piece]]:
    job: list[Piece] = []
    size = 0
    for piece in pieces:
        stats.read(piece)
        job.append(piece)
        size += len(piece.text)
        if size >= MAX_PIECE // 2:
            yield job
            job, size = [], 0
    if job:
        yield job


def _encode(job: list[Piece], tokenizer: Tokenizer) -> tuple[Ids, list[int], dict[str, int]]:
    """Return the tokens of a job, the starts of documents in them, and the unknown characters."""
    framed = tokenizer.eos != NO_TOKEN
    ends = [tokenizer.eos] * (
        framed and tokenizer.eos != tokenizer.bos
    )  # a single token serves as both
    bos = np.array([tokenizer.bos] * framed, np.int32)
    eos = np.array(ends, np.int32)
    parts, starts, n = list[Ids](), list[int](), 0
    texts = [piece.text for piece in job]
    for piece, ids in zip(job, tokenizer.encode_batch(texts), strict=True):
        if piece.begins:
            starts.append(n)
        document = [bos[: piece.begins], ids, eos[: piece.ends]]
        if piece.role:
            ids, counts = frame(piece.role, ids, tokenizer)
            document = [np.where(counts, ids, ~ids)]
        parts += document
        n += sum(map(len, document))
    return np.concatenate(parts), starts, tokenizer.unknown("".join(texts))


def _count_block(block: tuple[Ids, list[int], dict[str, int]], stats: TextStats) -> Ids:
    """Add an encoded block to the statistics; return its tokens."""
    ids, starts, unknown = block
    stats.starts.extend(stats.n_tokens + start for start in starts)
    stats.n_tokens += len(ids)
    stats.unknown.update(unknown)
    return ids
