"""The tokenizer of a text: learned from it, or read from a file.

Subwords are learned from an even sample of a long text, so that memory and time stay bounded;
characters are counted in the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from mlx_randygpt.config import ConfigError
from mlx_randygpt.data import DataError
from mlx_randygpt.files import read_text
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import MAX_CHARS, CharTokenizer
from mlx_randygpt.tokenizers.subword import DEFAULT_SIZE, KINDS, SubwordTokenizer

COUNTED_CHARACTERS = 1 << 17  # counted at a time
MAX_LEARNING_BYTES = 1 << 26  # bytes of text that subwords are learned from


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that is still to be learned."""

    kind: str = "char"  # "char" | "bpe" | "wordpiece"
    size: int = 0  # most characters, or most tokens with special ones; 0: the default of the kind

    def __post_init__(self) -> None:
        if self.kind == "char" and not 0 <= self.size <= MAX_CHARS:
            raise ConfigError(
                f"vocab_size={self.size} is not in 1..{MAX_CHARS}, the sizes of a char "
                "tokenizer; --tokenizer bpe supports more"
            )

    def learn(self, texts: Iterable[str], n_bytes: int) -> Tokenizer:
        """Learn the tokenizer from `texts`, which have about `n_bytes` in total."""
        if self.kind == "char":
            return CharTokenizer.train(_join(texts), self.size or MAX_CHARS)
        size = self.size or DEFAULT_SIZE
        return SubwordTokenizer.train(self.kind, _sample_evenly(texts, n_bytes), size)


def choose_tokenizer(name: str, size: int) -> Tokenizer | Vocabulary:
    """Return the kind to learn, or read the tokenizer in a file, as --tokenizer asks."""
    if name in ("char", *KINDS):
        return Vocabulary(name, size)
    if size:
        raise ConfigError(f"--vocab-size {size} cannot be combined with a tokenizer from a file")
    try:
        return SubwordTokenizer.from_file(read_text(Path(expanduser(name))))
    except OSError as error:
        raise DataError(
            f"--tokenizer {name} is not char, {', '.join(KINDS)} or a readable file: "
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


def _sample_evenly(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """Yield every k-th text, so that at most about MAX_LEARNING_BYTES of `n_bytes` remain."""
    stride = max(1, -(-n_bytes // MAX_LEARNING_BYTES))
    return (text for i, text in enumerate(texts) if i % stride == 0)
