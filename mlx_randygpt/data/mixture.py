"""Which windows a run draws: anywhere, inside documents, of conversations, by the weights of texts.

Validation of a text with conversations reads their windows only, so it counts answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError
from mlx_randygpt.data.conversations import cut_windows, find_turns
from mlx_randygpt.data.corpus import Array, Corpus
from mlx_randygpt.data.files import TextSource
from mlx_randygpt.data.token_file import TokenFile
from mlx_randygpt.data.windows import Conversations, Documents, Mixture, Windows
from mlx_randygpt.tokenizers import Tokenizer

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Drawing:
    """How windows are drawn: the options of a run."""

    block_size: int
    respect_documents: bool = False
    pack: bool = False  # several conversations in one window


def training_windows(
    corpus: Corpus, tokenizer: Tokenizer, sources: Sequence[TextSource], how: Drawing
) -> Windows | None:
    """Return the rule by which training windows are drawn; None: from anywhere in the text.

    `sources` are the files of the corpus. Raises DataError if a text with a weight, or the text
    beside conversations, has no window.
    """
    n = len(corpus.train)
    if not corpus.n_conversations and not any(source.path for source in sources):
        within = Documents.within
        return within(corpus.starts, n, how.block_size) if how.respect_documents else None
    files = _Files(corpus, tokenizer, how)
    groups = list(dict.fromkeys(source.path for source in sources))
    weights = {source.path: source.weight for source in sources}
    rest = 1 - sum(weights.values())
    parts, shares = list[Windows](), list[float]()
    for group in groups:
        members = [i for i, source in enumerate(sources) if source.path == group]
        found = files.windows(members)
        if not found:
            raise DataError(f"{group or corpus.names[members[0]]} has no text for training")
        total = sum(amount for _, amount in found)
        parts += [windows for windows, _ in found]
        shares += [(weights[group] or rest) * amount / total for _, amount in found]
    if len(parts) == 1:
        return parts[0]
    return Mixture(parts, np.array(shares) / sum(shares), how.block_size)


def conversations_in(
    tokens: Array | TokenFile, starts: Numbers, tokenizer: Tokenizer, how: Drawing
) -> Conversations:
    """Return the windows of all conversations of tokens whose documents begin at `starts`."""
    return cut_windows(find_turns(tokens, starts, tokenizer), how.block_size, pack=how.pack)


def validation_windows(corpus: Corpus, tokenizer: Tokenizer, how: Drawing) -> Conversations | None:
    """Return the windows that an evaluation reads; None: all tokens, in order."""
    if not corpus.n_conversations:
        return None
    n_train = len(corpus.train)
    starts = corpus.starts[corpus.starts >= n_train] - n_train
    return conversations_in(corpus.val, starts, tokenizer, how)


class _Files:
    """The training part of each file of a corpus."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, how: Drawing) -> None:
        assert corpus.split is not None, "the corpus is of files"
        n_tokens = np.subtract(corpus.split.n_tokens, corpus.split.n_val)
        self.edges = np.append(0, np.cumsum(n_tokens))  # (files + 1,)
        self.tokens, self.how = corpus.train, how
        self.starts = corpus.starts[corpus.starts < len(corpus.train)]
        self.turns = find_turns(self.tokens, self.starts, tokenizer)

    def windows(self, members: Sequence[int]) -> list[tuple[Windows, float]]:
        """Return the windows of some files by kind, and how many of each kind cover its tokens."""
        found = list[tuple[Windows, float]]()
        is_member = np.isin(np.arange(len(self.edges) - 1), members)
        of_turns = is_member[self._file(self.turns.first)]
        if of_turns.any():
            turns = self.turns.select(of_turns)
            talks = cut_windows(turns, self.how.block_size, pack=self.how.pack)
            found.append((talks, len(talks.first)))
        texts = is_member.copy()
        texts[self._file(self.turns.first)] = False
        texts &= np.diff(self.edges) > 0
        if texts.any():
            first, lengths = self._runs(texts)
            if lengths.max() <= self.how.block_size:
                raise DataError(
                    f"a text beside others has {lengths.max()} tokens; a context of "
                    f"{self.how.block_size} needs {self.how.block_size + 1}, a context and the "
                    "token after it; lower --block-size or leave the text out"
                )
            text = Documents.of(first, lengths, self.how.block_size)
            found.append((text, lengths.sum() / self.how.block_size))
        return found

    def _file(self, places: Numbers) -> Numbers:
        return np.searchsorted(self.edges, places, side="right") - 1

    def _runs(self, texts: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
        """Return begin and length of the documents of these files, or of their unbroken runs."""
        if self.how.respect_documents:
            lengths = np.diff(self.starts, append=len(self.tokens))
            within = texts[self._file(self.starts)]
            return self.starts[within], lengths[within]
        edges = np.flatnonzero(np.diff(texts, prepend=False, append=False))
        first, last = self.edges[edges[::2]], self.edges[edges[1::2]]
        return first, last - first
