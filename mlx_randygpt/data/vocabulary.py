"""The tokenizer of a text: learned from it, or read from a file.

By default it is characters if they cover the text, else byte-level BPE. Characters are counted in
the whole text. Subwords are learned from the part for training, so that the validation text is new
to them, and of a long text from an even sample, so that memory and time stay bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import ConfigError
from mlx_randygpt.data import DataError
from mlx_randygpt.data.split import TRAIN_SHARE
from mlx_randygpt.files import read_text
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import (
    MAX_CHARS,
    SURROGATES,
    CharTokenizer,
    count_characters,
)
from mlx_randygpt.tokenizers.subword import DEFAULT_SIZE, KINDS, SubwordTokenizer
from mlx_randygpt.words import format_bytes, format_share

COUNTED_CHARACTERS = 1 << 17  # counted at a time
MAX_LEARNING_BYTES = 1 << 26  # bytes of text that subwords are learned from
AUTO = "auto"  # the kind that the text decides
MAX_LOST = 0.001  # of a text's characters, if characters are chosen for it
BPE_SIZES = ((50_000, 512), (500_000, 1024), (5_000_000, 2048))  # up to so many bytes: tokens
LARGEST_BPE = 4096


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that is still to be learned."""

    kind: str = "char"  # "auto" | "char" | "bpe" | "wordpiece"
    size: int = 0  # most characters, or most tokens with special ones; 0: the default of the kind

    def __post_init__(self) -> None:
        if self.kind == "char" and not 0 <= self.size <= MAX_CHARS:
            raise ConfigError(
                f"vocab_size={self.size} is not in 1..{MAX_CHARS}, the sizes of a char "
                "tokenizer; --tokenizer bpe supports more"
            )

    @property
    def key(self) -> dict[str, Any]:
        """Return everything but the text that decides what is learned."""
        rule = {"rule": [MAX_CHARS, MAX_LOST, BPE_SIZES, LARGEST_BPE]}
        part = {} if self.kind == "char" else {"share": TRAIN_SHARE}  # that is learned from
        return asdict(self) | part | (rule if self.kind == AUTO else {})

    def learn(self, texts: Iterable[str], n_bytes: int) -> Tokenizer:
        """Learn the tokenizer of this kind from `texts`, which have about `n_bytes` in total."""
        assert self.kind != AUTO
        if self.kind == "char":
            return CharTokenizer.train(_join(texts), self.size or MAX_CHARS)
        part = _take_bytes(texts, int(TRAIN_SHARE * n_bytes))
        size = self.size or DEFAULT_SIZE
        return SubwordTokenizer.train(self.kind, _sample_evenly(part, n_bytes), size)


@dataclass(frozen=True)
class Choice:
    """The tokenizer that the rule chose for a text, and the facts that decided it."""

    n_chars: int  # different characters
    lost: float  # share of the text that is not among its MAX_CHARS most frequent characters
    n_bytes: int  # of the text in UTF-8

    @classmethod
    def by_counts(cls, counts: NDArray[np.int64]) -> Choice:
        """Choose by the characters of the whole text, as `count_characters` counts them.

        Lone surrogates, which no tokenizer can hold, do not count.
        """
        codes = np.flatnonzero(counts)
        codes = codes[(codes < SURROGATES.start) | (codes >= SURROGATES.stop)]
        n = counts[codes]
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        kept = int(np.sort(n)[::-1][:MAX_CHARS].sum())
        total = int(n.sum())
        return cls(len(codes), (total - kept) / max(1, total), int(n @ widths))

    @property
    def vocabulary(self) -> Vocabulary:
        """Return what is to be learned."""
        if self.lost <= MAX_LOST:
            return Vocabulary("char")
        sizes = (size for most, size in BPE_SIZES if self.n_bytes <= most)
        return Vocabulary("bpe", next(sizes, LARGEST_BPE))

    def describe(self, tokenizer: Tokenizer) -> str:
        """Return one line that names the chosen tokenizer and the reason."""
        if self.vocabulary.kind == "bpe":
            return (
                f"Tokenizer: byte-level BPE, {tokenizer.vocab_size:,} tokens for "
                f"{format_bytes(self.n_bytes)} of text; characters would lose "
                f"{format_share(self.lost)} ({self.n_chars:,} different ones, {MAX_CHARS} fit)."
            )
        if not self.lost:
            return f"Tokenizer: characters; all {self.n_chars:,} different ones of the text fit."
        return (
            f"Tokenizer: characters; the {MAX_CHARS} most frequent of {self.n_chars:,} cover all "
            f"but {format_share(self.lost)} of the text."
        )


def learn(
    requested: Vocabulary, texts: Callable[[], Iterable[str]], n_bytes: int
) -> tuple[Tokenizer, Choice | None]:
    """Learn the tokenizer that is `requested`; with "auto" the text decides the kind and the size.

    Each call of `texts` reads the text, which has about `n_bytes`, from its beginning.
    """
    if requested.kind != AUTO:
        return requested.learn(texts(), n_bytes), None
    counts = count_characters(_join(texts()))
    choice = Choice.by_counts(counts)
    if choice.vocabulary.kind == "char":
        return CharTokenizer.most_frequent(counts), choice
    return choice.vocabulary.learn(texts(), choice.n_bytes), choice


def choose_tokenizer(name: str, size: int) -> Tokenizer | Vocabulary:
    """Return the kind to learn, or read the tokenizer in a file, as --tokenizer asks.

    With "auto" a `size` is the limit of characters, or the size of a BPE if it is beyond them.
    """
    if name == AUTO and size:
        name = "char" if size <= MAX_CHARS else "bpe"
    if name in (AUTO, "char", *KINDS):
        return Vocabulary(name, size)
    if size:
        raise ConfigError(f"--vocab-size {size} cannot be combined with a tokenizer from a file")
    try:
        return SubwordTokenizer.from_file(read_text(Path(expanduser(name))))
    except OSError as error:
        raise DataError(
            f"--tokenizer {name} is not {AUTO}, char, {', '.join(KINDS)} or a readable file: "
            f"{error.strerror}"
        ) from error
    except ValueError as error:
        reason = str(error).removeprefix("tokenizer: ")
        raise DataError(f"--tokenizer {name}: {reason}") from error


def _join(texts: Iterable[str]) -> Iterator[str]:
    """Join short texts: counting characters with NumPy has a cost per call."""
    waiting, size = list[str](), 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= COUNTED_CHARACTERS:
            yield "".join(waiting)
            waiting, size = [], 0
    yield "".join(waiting)


def _take_bytes(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """Yield the beginning of the texts, at most `n_bytes` in UTF-8."""
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        if len(raw) >= n_bytes:
            yield raw[:n_bytes].decode("utf-8", "ignore")
            return
        n_bytes -= len(raw)
        yield text


def _sample_evenly(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """Yield every k-th text, so that at most about MAX_LEARNING_BYTES of `n_bytes` remain."""
    stride = max(1, -(-n_bytes // MAX_LEARNING_BYTES))
    return (text for i, text in enumerate(texts) if i % stride == 0)
