"""Text to token ids and back, behind one small interface, and its simplest form: one character
is one token. Subwords are in `subword.py`.

Owns the vocabulary, its special tokens and its JSON form. Knows nothing of files, models or
sampling, only which ids a sampler must leave alone.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import LIMITS

MAX_CHARS = 512
REPLACEMENT = 0xFFFD  # what <unk> decodes to
CODE_POINTS = 0x110000


class Tokenizer(Protocol):
    """What everything else may ask of a tokenizer. Tokenizers of one vocabulary are equal."""

    @property
    def vocab_size(self) -> int:
        """V, special tokens included."""

    @property
    def bos(self) -> int:
        """The id before a document, and what an empty prompt becomes."""

    @property
    def eos(self) -> int:
        """The id after a document, where generation may stop. NEVER: nothing ends a text, and
        documents follow each other without anything between them."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of `text`, without BOS or EOS; never fails."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """`encode` of each text; may be called from several threads at once."""

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of `ids`; ValueError for an id outside the vocabulary."""

    def decoder(self) -> Callable[[int], str]:
        """Text as its tokens come: each call takes the next id and gives what is complete by
        then, so that half a character is never shown."""

    def unknown(self, text: str) -> dict[str, int]:
        """What `encode` loses: each character that becomes `<unk>` and how often, most first."""

    def token_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes per token, (V,); 0 for BOS and EOS, 1 for a character that is not known."""

    def never_sampled(self) -> tuple[int, ...]:
        """Ids that generation must not pick."""

    def to_json(self) -> dict[str, Any]:
        """What `tokenizer_from_json` reads back."""


@dataclass(frozen=True)
class CharTokenizer:
    """Ids 0 to n-1 are `chars`, sorted by code point; then come `<bos>`, `<eos>` and `<unk>`."""

    chars: str

    @classmethod
    def train(cls, texts: str | Iterable[str], max_chars: int = MAX_CHARS) -> CharTokenizer:
        """The `max_chars` most frequent characters of `texts`; of equals, the lower code points."""
        if not 1 <= max_chars <= MAX_CHARS:
            raise ValueError(f"max_chars={max_chars} is not in 1..{MAX_CHARS}")
        counts = np.zeros(CODE_POINTS, np.int64)
        for text in [texts] if isinstance(texts, str) else texts:
            count = np.bincount(code_points(text))
            counts[: len(count)] += count
        counts[SURROGATES.start : SURROGATES.stop] = 0
        found = np.flatnonzero(counts)
        by_count = np.argsort(-counts[found], kind="stable")
        return cls("".join(map(chr, sorted(found[by_count[:max_chars]].tolist()))))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CharTokenizer:
        """The tokenizer of a `to_json`; ValueError says what is wrong with it."""
        chars = data.get("chars")
        if not isinstance(chars, list):
            raise ValueError(f"tokenizer: chars={reprlib.repr(chars)} is not a list of characters")
        for i, char in enumerate(chars):
            if not isinstance(char, str) or len(char) != 1:
                raise ValueError(f"tokenizer: chars[{i}]={reprlib.repr(char)} is not one character")
        return cls("".join(chars))

    def __post_init__(self) -> None:
        if not 1 <= len(self.chars) <= MAX_CHARS:
            raise ValueError(f"tokenizer: {len(self.chars)} characters; it takes 1 to {MAX_CHARS}")
        for a, b in pairwise(self.chars):
            if a >= b:
                wrong = "is there twice" if a == b else f"comes before {b!r}, out of order"
                raise ValueError(f"tokenizer: the character {a!r} {wrong}")
        for char in self.chars:
            if ord(char) in SURROGATES:
                raise ValueError(f"tokenizer: {char!r} is half a character, a lone surrogate")

    @property
    def bos(self) -> int:
        return len(self.chars)

    @property
    def eos(self) -> int:
        return len(self.chars) + 1

    @property
    def unk(self) -> int:
        """The id of every character outside `chars`."""
        return len(self.chars) + 2

    @property
    def vocab_size(self) -> int:
        return len(self.chars) + 3

    def encode(self, text: str) -> NDArray[np.int32]:
        # Code points past the table are clipped to its last entry, which is <unk>.
        return self._id_of_code.take(code_points(text), mode="clip")

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        ends = np.cumsum([len(text) for text in texts])
        return np.split(self.encode("".join(texts)), ends[:-1])

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        ids = np.asarray(ids, np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is not in 0..{self.vocab_size - 1}")
        spelled = ids[(ids != self.bos) & (ids != self.eos)]
        return str(self._code_of_id[spelled].tobytes(), "utf-32-le")

    def decoder(self) -> Callable[[int], str]:
        return self._texts.__getitem__

    def unknown(self, text: str) -> dict[str, int]:
        lost = self.encode(text) == self.unk
        if not lost.any():
            return {}
        found, counts = np.unique(code_points(text)[lost], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {chr(found[i]): int(counts[i]) for i in order}

    def token_bytes(self) -> NDArray[np.int64]:
        return np.array([len(char.encode()) for char in self.chars] + [0, 0, 1], np.int64)

    def never_sampled(self) -> tuple[int, ...]:
        return self.bos, self.unk

    def to_json(self) -> dict[str, Any]:
        return {"type": "char", "chars": list(self.chars)}

    @cached_property
    def _id_of_code(self) -> NDArray[np.int32]:
        table = np.full(ord(self.chars[-1]) + 2, self.unk, np.int32)
        table[code_points(self.chars)] = np.arange(len(self.chars))
        return table

    @cached_property
    def _texts(self) -> list[str]:
        return [self.decode([token]) for token in range(self.vocab_size)]

    @cached_property
    def _code_of_id(self) -> NDArray[np.uint32]:
        return np.append(code_points(self.chars), [0, 0, REPLACEMENT]).astype("<u4")


def tokenizer_from_json(data: object) -> Tokenizer:
    """The tokenizer that wrote `data` with `to_json`; ValueError says what is wrong with it."""
    if not isinstance(data, dict):
        raise ValueError(f"tokenizer: {reprlib.repr(data)} is not a JSON object")
    if data.get("type") == "char":
        return CharTokenizer.from_json(data)
    if data.get("type") == "table":
        return FixedCharTokenizer.from_json(data)
    from mlx_randygpt.tokenizers.subword import SubwordTokenizer

    return SubwordTokenizer.from_json(data)


NO_TOKEN = -1  # an id that no text has
SURROGATES = range(0xD800, 0xE000)  # code points that no UTF-8 text can hold


@dataclass(frozen=True)
class FixedCharTokenizer:
    """`symbols[i]` is the character of id i, or "" where the id stands for none.

    A character that is not in the table is left out. Nothing ends a text. An empty prompt becomes
    `begin`, or a newline where there is no such id.
    """

    symbols: tuple[str, ...]
    begin: int = NO_TOKEN

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FixedCharTokenizer:
        """The tokenizer of a `to_json`; ValueError says what is wrong with it."""
        symbols, begin = data.get("symbols"), data.get("begin")
        if not isinstance(symbols, list) or not all(isinstance(s, str) for s in symbols):
            raise ValueError(f"tokenizer: symbols={reprlib.repr(symbols)} is not a list of texts")
        if begin is not None and type(begin) is not int:
            raise ValueError(f"tokenizer: begin={reprlib.repr(begin)} is not a token id")
        return cls(tuple(symbols), NO_TOKEN if begin is None else begin)

    def __post_init__(self) -> None:
        if len(self.symbols) > LIMITS["vocab_size"]:
            raise ValueError(
                f"tokenizer: {len(self.symbols)} symbols; it takes {LIMITS['vocab_size']}"
            )
        if not any(self.symbols):
            raise ValueError("tokenizer: it has no characters")
        for symbol in self.symbols:
            if len(symbol) > 1:
                raise ValueError(f"tokenizer: {reprlib.repr(symbol)} is not one character")
            if symbol and ord(symbol) in SURROGATES:
                raise ValueError(f"tokenizer: {symbol!r} is half a character, a lone surrogate")
        symbol, count = Counter(filter(None, self.symbols)).most_common(1)[0]
        if count > 1:
            raise ValueError(f"tokenizer: the character {symbol!r} is there twice")
        if not NO_TOKEN <= self.begin < len(self.symbols):
            raise ValueError(f"tokenizer: begin={self.begin} is not in 0..{len(self.symbols) - 1}")

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    @cached_property
    def bos(self) -> int:
        if self.begin != NO_TOKEN:
            return self.begin
        named = (symbol for symbol in ("\n", " ") if symbol in self.symbols)
        return self.symbols.index(next(named, next(filter(None, self.symbols))))

    @property
    def eos(self) -> int:
        return NO_TOKEN

    def encode(self, text: str) -> NDArray[np.int32]:
        ids: NDArray[np.int32] = self._id_of_code.take(code_points(text), mode="clip")
        return np.compress(ids != NO_TOKEN, ids)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        listed = np.asarray(ids, np.int64).tolist()
        for token in listed:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is not in 0..{self.vocab_size - 1}")
        return "".join(map(self.symbols.__getitem__, listed))

    def decoder(self) -> Callable[[int], str]:
        return self.symbols.__getitem__

    def unknown(self, text: str) -> dict[str, int]:
        known = set(self.symbols)
        return dict(Counter(char for char in text if char not in known).most_common())

    def token_bytes(self) -> NDArray[np.int64]:
        return np.array([len(symbol.encode()) for symbol in self.symbols], np.int64)

    def never_sampled(self) -> tuple[int, ...]:
        return tuple(token for token, symbol in enumerate(self.symbols) if not symbol)

    def to_json(self) -> dict[str, Any]:
        begin = None if self.begin == NO_TOKEN else self.begin
        return {"type": "table", "symbols": list(self.symbols), "begin": begin}

    @cached_property
    def _id_of_code(self) -> NDArray[np.int32]:
        """id of each code point, NEVER of those past the last."""
        named = {ord(symbol): token for token, symbol in enumerate(self.symbols) if symbol}
        table = np.full(max(named) + 2, NO_TOKEN, np.int32)
        table[list(named)] = list(named.values())
        return table


def code_points(text: str) -> NDArray[np.uint32] | NDArray[np.uint8]:
    """The numbers of the characters; half characters have theirs."""
    if text.isascii():  # a quarter of the memory to read
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
