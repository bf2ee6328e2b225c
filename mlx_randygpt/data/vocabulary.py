"""Which tokenizer a text gets: learned from it, or read from a file.

Long texts are sampled evenly for subwords, so that memory and time stay bounded; characters are
counted in all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from mlx_randygpt.config import ConfigError
from mlx_randygpt.data import DataError
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import MAX_CHARS, CharTokenizer
from mlx_randygpt.tokenizers.subword import DEFAULT_SIZE, KINDS, SubwordTokenizer

TOGETHER = 1 << 17  # characters that are counted at a time
MAX_LEARNING_BYTES = 1 << 26  # bytes of text that subwords are learned from


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that is yet to be learned."""

    kind: str = "char"  # "char" | "bpe" | "wordpiece"
    size: int = 0  # characters at most, or tokens with the special ones; 0 is the kind's own

    def __post_init__(self) -> None:
        if self.kind == "char" and not 0 <= self.size <= MAX_CHARS:
            raise ConfigError(
                f"vocab_size={self.size} is not in 1..{MAX_CHARS}, the characters of a char "
                "tokenizer; --tokenizer bpe takes more"
            )

    def learn(self, texts: Iterable[str], n_bytes: int) -> Tokenizer:
        """The tokenizer of `texts`, which have about `n_bytes` in all."""
        if self.kind == "char":
            return CharTokenizer.train(_together(texts), self.size or MAX_CHARS)
        size = self.size or DEFAULT_SIZE
        return SubwordTokenizer.train(self.kind, _evenly(texts, n_bytes), size)


def choose_tokenizer(name: str, size: int) -> Tokenizer | Vocabulary:
    """What `--tokenizer` names: a kind to learn, or the tokenizer in a file."""
    if name in ("char", *KINDS):
        return Vocabulary(name, size)
    if size:
        raise ConfigError(f"--vocab-size {size} does not go with a tokenizer that is in a file")
    try:
        return SubwordTokenizer.from_file(Path(expanduser(name)).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"--tokenizer {name} is neither char, {', '.join(KINDS)} nor a file: {error.strerror}"
        ) from error
    except ValueError as error:
        reason = str(error).removeprefix("tokenizer: ")
        raise DataError(f"--tokenizer {name}: {reason}") from error


def _together(texts: Iterable[str]) -> Iterator[str]:
    """Short texts joined, for counting characters: each call of NumPy has its price."""
    waiting, size = list[str](), 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= TOGETHER:
            yield "".join(waiting)
            waiting, size = [], 0
    yield "".join(waiting)


def _evenly(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """Every k-th text, so that about ENOUGH of `n_bytes` is left."""
    stride = max(1, -(-n_bytes // MAX_LEARNING_BYTES))
    return (text for i, text in enumerate(texts) if i % stride == 0)
