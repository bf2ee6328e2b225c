"""Tokenizers whose tokens are single characters."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import LIMITS
from mlx_randygpt.tokenizers import DIALOGUE_TOKENS, END_OF_TURN, NO_TOKEN

MAX_CHARS = 512
REPLACEMENT = 0xFFFD  # the character that <unk> decodes to
CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)  # code points that UTF-8 cannot encode
UNK = "<unk>"
SPECIALS = ("<bos>", "<eos>", UNK)


@dataclass(frozen=True)
class CharTokenizer:
    """Ids 0 to n-1 are `chars`, in ascending order; then come `<bos>`, `<eos>` and `<unk>`.

    With `dialogue`, DIALOGUE_TOKENS are the last.
    """

    chars: str
    dialogue: bool = False

    @classmethod
    def train(cls, texts: str | Iterable[str], max_chars: int = MAX_CHARS) -> CharTokenizer:
        """Learn the `max_chars` most frequent characters; lower code points win ties."""
        counts = count_characters([texts] if isinstance(texts, str) else texts)
        return cls.most_frequent(counts, max_chars)

    @classmethod
    def most_frequent(cls, counts: NDArray[np.int64], max_chars: int = MAX_CHARS) -> CharTokenizer:
        """Keep the `max_chars` most frequent of the counted characters, (CODE_POINTS,)."""
        if not 1 <= max_chars <= MAX_CHARS:
            raise ValueError(f"max_chars={max_chars} is not in 1..{MAX_CHARS}")
        codes = np.flatnonzero(counts)
        codes = codes[(codes < SURROGATES.start) | (codes >= SURROGATES.stop)]
        by_count = np.argsort(-counts[codes], kind="stable")
        return cls("".join(map(chr, sorted(codes[by_count[:max_chars]].tolist()))))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CharTokenizer:
        """Build the tokenizer from the result of `to_json`; raise ValueError if it is invalid."""
        chars = data.get("chars")
        if not isinstance(chars, list):
            raise ValueError(f"tokenizer: chars={reprlib.repr(chars)} is not a list of characters")
        for i, char in enumerate(chars):
            if not isinstance(char, str) or len(char) != 1:
                raise ValueError(f"tokenizer: chars[{i}]={reprlib.repr(char)} is not one character")
        return cls("".join(chars), _dialogue(data))

    def __post_init__(self) -> None:
        if not 1 <= len(self.chars) <= MAX_CHARS:
            raise ValueError(
                f"tokenizer: {len(self.chars)} characters; 1 to {MAX_CHARS} are possible"
            )
        for a, b in pairwise(self.chars):
            if a >= b:
                problem = "occurs twice" if a == b else f"comes before {b!r}, out of order"
                raise ValueError(f"tokenizer: the character {a!r} {problem}")
        for char in self.chars:
            if ord(char) in SURROGATES:
                raise ValueError(f"tokenizer: {char!r} is half a character, a lone surrogate")

    @property
    def bos(self) -> int:
        """Return the id before a document."""
        return len(self.chars)

    @property
    def eos(self) -> int:
        """Return the id after a document."""
        return len(self.chars) + 1

    @property
    def unk(self) -> int:
        """Return the id of every character outside `chars`."""
        return len(self.chars) + 2

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, special tokens included."""
        return len(self.chars) + len(self.specials)

    @property
    def specials(self) -> tuple[str, ...]:
        """Return the names of the special tokens, whose ids follow those of the characters."""
        return SPECIALS + DIALOGUE_TOKENS * self.dialogue

    def special(self, name: str) -> int:
        """Return the id of the special token with this name, NO_TOKEN if there is none."""
        return len(self.chars) + self.specials.index(name) if name in self.specials else NO_TOKEN

    def with_dialogue(self) -> CharTokenizer:
        """Return the tokenizer with DIALOGUE_TOKENS."""
        return replace(self, dialogue=True)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of `text`, without BOS and EOS."""
        # Code points past the table are clipped to its last entry, which is <unk>.
        return self._id_of_code.take(code_points(text), mode="clip")

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode each text."""
        ends = np.cumsum([len(text) for text in texts])
        return np.split(self.encode("".join(texts)), ends)[:-1]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of `ids`; raise ValueError for an id outside the vocabulary."""
        ids = np.asarray(ids, np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is not in 0..{self.vocab_size - 1}")
        visible = ids[(ids < self.bos) | (ids == self.unk)]
        return str(self._code_of_id[visible].tobytes(), "utf-32-le")

    def decoder(self) -> Callable[[int], str]:
        """Return a function from the next id to the text that it completes."""
        return self._texts.__getitem__

    def unknown(self, text: str) -> dict[str, int]:
        """Count the characters that `encode` replaces by `<unk>`, most frequent first."""
        unknown = self.encode(text) == self.unk
        if not unknown.any():
            return {}
        codes, counts = np.unique(code_points(text)[unknown], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {chr(codes[i]): int(counts[i]) for i in order}

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the UTF-8 bytes per token, (V,)."""
        sizes = [len(char.encode()) for char in self.chars]
        return np.array([*sizes, *(int(name == UNK) for name in self.specials)], np.int64)

    def never_sampled(self) -> tuple[int, ...]:
        """Return the ids that generation must not pick."""
        return self.bos, *range(self.unk, self.vocab_size - self.dialogue)  # END_OF_TURN is last

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as JSON, for `tokenizer_from_json`."""
        fields: dict[str, Any] = {"type": "char", "chars": list(self.chars)}
        return fields | {"dialogue": True} if self.dialogue else fields

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


@dataclass(frozen=True)
class FixedCharTokenizer:
    """A fixed table: `symbols[i]` is the character of id i, or "" if the id has no character.

    Characters outside the table are dropped. No token ends a text. An empty prompt becomes `begin`
    or, without one, a newline. With `dialogue`, DIALOGUE_TOKENS follow the table.
    """

    symbols: tuple[str, ...]
    begin: int = NO_TOKEN
    dialogue: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FixedCharTokenizer:
        """Build the tokenizer from the result of `to_json`; raise ValueError if it is invalid."""
        symbols, begin = data.get("symbols"), data.get("begin")
        if not isinstance(symbols, list) or not all(isinstance(s, str) for s in symbols):
            raise ValueError(f"tokenizer: symbols={reprlib.repr(symbols)} is not a list of texts")
        if begin is not None and type(begin) is not int:
            raise ValueError(f"tokenizer: begin={reprlib.repr(begin)} is not a token id")
        return cls(tuple(symbols), NO_TOKEN if begin is None else begin, _dialogue(data))

    def __post_init__(self) -> None:
        if len(self.symbols) > LIMITS["vocab_size"]:
            raise ValueError(
                f"tokenizer: {len(self.symbols)} symbols; "
                f"at most {LIMITS['vocab_size']} are possible"
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
            raise ValueError(f"tokenizer: the character {symbol!r} occurs twice")
        if not NO_TOKEN <= self.begin < len(self.symbols):
            raise ValueError(f"tokenizer: begin={self.begin} is not in 0..{len(self.symbols) - 1}")

    @property
    def vocab_size(self) -> int:
        """Return the number of ids."""
        return len(self._texts)

    @cached_property
    def bos(self) -> int:
        """Return the id that stands for an empty prompt."""
        if self.begin != NO_TOKEN:
            return self.begin
        blanks = (symbol for symbol in ("\n", " ") if symbol in self.symbols)
        return self.symbols.index(next(blanks, next(filter(None, self.symbols))))

    @property
    def eos(self) -> int:
        """Return NO_TOKEN: no token ends a text."""
        return NO_TOKEN

    def special(self, name: str) -> int:
        """Return the id of the special token with this name, NO_TOKEN if there is none."""
        known = self.dialogue and name in DIALOGUE_TOKENS
        return len(self.symbols) + DIALOGUE_TOKENS.index(name) if known else NO_TOKEN

    def with_dialogue(self) -> FixedCharTokenizer:
        """Return the tokenizer with DIALOGUE_TOKENS."""
        return replace(self, dialogue=True)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of `text`, without BOS and EOS."""
        ids: NDArray[np.int32] = self._id_of_code.take(code_points(text), mode="clip")
        return np.compress(ids != NO_TOKEN, ids)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of `ids`; raise ValueError for an id outside the vocabulary."""
        tokens = np.asarray(ids, np.int64).tolist()
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is not in 0..{self.vocab_size - 1}")
        return "".join(map(self._texts.__getitem__, tokens))

    def decoder(self) -> Callable[[int], str]:
        """Return a function from the next id to the text that it completes."""
        return self._texts.__getitem__

    def unknown(self, text: str) -> dict[str, int]:
        """Count the characters that `encode` drops, most frequent first."""
        symbols = set(self.symbols)
        return dict(Counter(char for char in text if char not in symbols).most_common())

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the UTF-8 bytes per token, (V,)."""
        return np.array([len(text.encode()) for text in self._texts], np.int64)

    def never_sampled(self) -> tuple[int, ...]:
        """Return the ids that generation must not pick."""
        end = self.special(END_OF_TURN)
        return tuple(i for i, text in enumerate(self._texts) if not text and i != end)

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as JSON, for `tokenizer_from_json`."""
        begin = None if self.begin == NO_TOKEN else self.begin
        fields = {"type": "table", "symbols": list(self.symbols), "begin": begin}
        return fields | {"dialogue": True} if self.dialogue else fields

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        """Return the text of each id."""
        return self.symbols + ("",) * (len(DIALOGUE_TOKENS) * self.dialogue)

    @cached_property
    def _id_of_code(self) -> NDArray[np.int32]:
        """Return the id of each code point, NO_TOKEN for code points outside the table."""
        id_of = {ord(symbol): token for token, symbol in enumerate(self.symbols) if symbol}
        table = np.full(max(id_of) + 2, NO_TOKEN, np.int32)
        table[list(id_of)] = list(id_of.values())
        return table


def _dialogue(data: Mapping[str, Any]) -> bool:
    """Return whether the JSON of a tokenizer has DIALOGUE_TOKENS."""
    dialogue = data.get("dialogue", False)
    if type(dialogue) is not bool:
        raise ValueError(f"tokenizer: dialogue={reprlib.repr(dialogue)} is not true or false")
    return dialogue


def count_characters(texts: Iterable[str]) -> NDArray[np.int64]:
    """Count each code point of the texts, lone surrogates included, (CODE_POINTS,)."""
    counts = np.zeros(CODE_POINTS, np.int64)
    for text in texts:
        count = np.bincount(code_points(text))
        counts[: len(count)] += count
    return counts


def code_points(text: str) -> NDArray[np.uint32] | NDArray[np.uint8]:
    """Return the code points of a text, lone surrogates included."""
    if text.isascii():  # needs a quarter of the memory
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
