"""A table of characters that another program made: their ids stay as they are, in any order, and
there need be no tokens for begin, end and unknown.

Text is what such a model has read and nothing around it, so documents follow each other as they
are. Knows nothing of files.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import MOST

NEVER = -1  # an id that no text has
SURROGATES = range(0xD800, 0xE000)  # code points that no UTF-8 text can hold


@dataclass(frozen=True)
class TableTokenizer:
    """`symbols[i]` is the character of id i, or "" where the id stands for none.

    A character that is not in the table is left out. Nothing ends a text. An empty prompt becomes
    `begin`, or a newline where there is no such id.
    """

    symbols: tuple[str, ...]
    begin: int = NEVER

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TableTokenizer:
        """The tokenizer of a `to_json`; ValueError says what is wrong with it."""
        symbols, begin = data.get("symbols"), data.get("begin")
        if not isinstance(symbols, list) or not all(isinstance(s, str) for s in symbols):
            raise ValueError(f"tokenizer: symbols={reprlib.repr(symbols)} is not a list of texts")
        if begin is not None and type(begin) is not int:
            raise ValueError(f"tokenizer: begin={reprlib.repr(begin)} is not a token id")
        return cls(tuple(symbols), NEVER if begin is None else begin)

    def __post_init__(self) -> None:
        if len(self.symbols) > MOST["vocab_size"]:
            raise ValueError(
                f"tokenizer: {len(self.symbols)} symbols; it takes {MOST['vocab_size']}"
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
        if not NEVER <= self.begin < len(self.symbols):
            raise ValueError(f"tokenizer: begin={self.begin} is not in 0..{len(self.symbols) - 1}")

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    @cached_property
    def bos(self) -> int:
        if self.begin != NEVER:
            return self.begin
        named = (symbol for symbol in ("\n", " ") if symbol in self.symbols)
        return self.symbols.index(next(named, next(filter(None, self.symbols))))

    @property
    def eos(self) -> int:
        return NEVER

    def encode(self, text: str) -> NDArray[np.int32]:
        ids: NDArray[np.int32] = self._id_of_code.take(code_points(text), mode="clip")
        return np.compress(ids != NEVER, ids)

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
        begin = None if self.begin == NEVER else self.begin
        return {"type": "table", "symbols": list(self.symbols), "begin": begin}

    @cached_property
    def _id_of_code(self) -> NDArray[np.int32]:
        """id of each code point, NEVER of those past the last."""
        named = {ord(symbol): token for token, symbol in enumerate(self.symbols) if symbol}
        table = np.full(max(named) + 2, NEVER, np.int32)
        table[list(named)] = list(named.values())
        return table


def code_points(text: str) -> NDArray[np.uint32] | NDArray[np.uint8]:
    """The numbers of the characters; half characters have theirs."""
    if text.isascii():  # a quarter of the memory to read
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
