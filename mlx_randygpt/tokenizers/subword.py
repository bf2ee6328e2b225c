"""Subword tokenizers: byte-level BPE and WordPiece, learned or from a tokenizer.json.

Owns what the library `tokenizers` is asked for and how its tokens become bytes. What is learned
here spells every text: the 256 bytes are in the vocabulary. Knows nothing of files or models.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import LIMITS, ConfigError, missing

KINDS = ("bpe", "wordpiece")
MIN_VOCAB_SIZE = {"bpe": 258, "wordpiece": 515}  # bytes, first and inner ones apart, and specials
DEFAULT_SIZE = 1024
BOS, EOS, UNK = "<bos>", "<eos>", "<unk>"
END_OF_TEXT = "<|endoftext|>"
BOS_NAMES = (BOS, "<s>", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", END_OF_TEXT)
EOS_NAMES = (EOS, "</s>", "<|eos|>", "<|end_of_text|>", END_OF_TEXT, "[SEP]")
INNER = "⋯"  # before a WordPiece that goes on with a word; no byte is spelled so, as "##" would be
MAX_WORD_BYTES = 64  # bytes of a word under WordPiece, whose search is cubic in it
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece spells a single byte


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise missing("a subword tokenizer", "tokenizers", "tokenizers") from error
    return tokenizers


def spelling() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary: GPT-2's table. Bytes
    that print in Latin-1 stand for themselves, the others for 256, 257, …"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


@dataclass(frozen=True)
class SubwordTokenizer:
    """A tokenizer.json, in full, and the few questions that a run asks of it."""

    kind: str  # "bpe" | "wordpiece" | "file"
    content: str  # the JSON text, as the library writes it

    @classmethod
    def train(cls, kind: str, texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
        """Learn at most `vocab_size` tokens, special ones included; ConfigError for too few."""
        if not MIN_VOCAB_SIZE[kind] <= vocab_size <= LIMITS["vocab_size"]:
            raise ConfigError(
                f"vocab_size={vocab_size} does not fit a {kind} tokenizer; it takes "
                f"{MIN_VOCAB_SIZE[kind]} to {LIMITS['vocab_size']}, for every byte is a token"
            )
        learn = _learn_bpe if kind == "bpe" else _learn_wordpiece
        return cls(kind, learn(_library(), map(_scalars, texts), vocab_size).to_str())

    @classmethod
    def from_file(cls, content: str) -> SubwordTokenizer:
        """The tokenizer of a tokenizer.json; ValueError says what is wrong with it.

        Its own tokens begin and end a document where it has some, such as <|endoftext|>, which
        does both; where it has none, <|endoftext|> is added.
        """
        model = _read(content)
        known = model.get_vocab()
        names = [n for n in (*BOS_NAMES, *EOS_NAMES) if n in known] or [END_OF_TEXT]
        special = _library().AddedToken
        model.add_special_tokens([special(name, special=True) for name in names])
        return cls("file", model.to_str())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SubwordTokenizer:
        """The tokenizer of a `to_json`; ValueError says what is wrong with it."""
        kind, content = data.get("type"), data.get("tokenizer")
        if kind not in (*KINDS, "file"):
            raise ValueError(
                f"tokenizer: type={reprlib.repr(kind)} is unknown; "
                f"it is char, {', '.join(KINDS)} or file"
            )
        if not isinstance(content, dict):
            raise ValueError(f"tokenizer: {reprlib.repr(content)} is not the JSON of a {kind}")
        return cls(str(kind), _read(json.dumps(content)).to_str())

    @property
    def vocab_size(self) -> int:
        return len(self._names)

    @cached_property
    def bos(self) -> int:
        return self._first_of(BOS_NAMES, EOS_NAMES)

    @cached_property
    def eos(self) -> int:
        return self._first_of(EOS_NAMES, BOS_NAMES)

    def encode(self, text: str) -> NDArray[np.int32]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        # A batch, be it of one, is encoded without Python's lock: other threads go on.
        batch = [_scalars(text) for text in texts]
        found = self._model.encode_batch_fast(batch, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        listed = np.asarray(ids, np.int64).tolist()
        for token in listed:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is not in 0..{self.vocab_size - 1}")
        if self._bytes is not None:
            return b"".join(map(self._bytes.__getitem__, listed)).decode("utf-8", "replace")
        return str(self._model.decode(listed, skip_special_tokens=True))

    def decoder(self) -> Callable[[int], str]:
        spelled = self._bytes
        if spelled is None:
            return StreamDecoder(self.decode)
        half = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: half.decode(spelled[token])

    def unknown(self, text: str) -> dict[str, int]:
        if self._bytes is not None:
            return {}
        if self._unk is None:
            known = self._characters
            return dict(Counter(c for c in text if known and c not in known).most_common())
        found = self._model.encode(_scalars(text), add_special_tokens=False)
        pairs = zip(found.ids, found.offsets, strict=True)
        return dict(Counter(text[a:b] for id_, (a, b) in pairs if id_ == self._unk).most_common())

    def token_bytes(self) -> NDArray[np.int64]:
        if self._bytes is not None:
            return np.array([len(spelled) for spelled in self._bytes], np.int64)
        return np.array([self._n_bytes(token) for token in range(self.vocab_size)], np.int64)

    def never_sampled(self) -> tuple[int, ...]:
        nameless = {token for token, name in enumerate(self._names) if not name}
        unknown = set() if self._unk is None else {self._unk}
        return tuple(sorted((self._special | nameless | unknown | {self.bos}) - {self.eos}))

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "tokenizer": json.loads(self.content)}

    @cached_property
    def _model(self) -> Any:
        return _read(self.content)

    @cached_property
    def _names(self) -> list[str]:
        """The token of each id as it is spelled; "" where no token has the id."""
        known: dict[str, int] = self._model.get_vocab()
        names = [""] * (max(known.values()) + 1)
        for name, token in known.items():
            names[token] = name
        return names

    @cached_property
    def _special(self) -> set[int]:
        added = self._model.get_added_tokens_decoder()
        return {token for token, about in added.items() if about.special}

    @cached_property
    def _unk(self) -> int | None:
        name = json.loads(self.content)["model"].get("unk_token")
        return self._names.index(name) if name in self._names else None

    @cached_property
    def _characters(self) -> set[str]:
        """The characters that are tokens, where a BPE leaves out all others; else none."""
        content = json.loads(self.content)
        model, is_plain = content["model"], content.get("normalizer") is None
        drops = model["type"] == "BPE" and not model.get("byte_fallback")
        return set(self._names) if drops and is_plain else set()

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        """The bytes of each token where it has bytes of its own; None: a token's text depends on
        its neighbours."""
        decoder = json.loads(self.content).get("decoder") or {}
        if decoder.get("type") != "ByteLevel" and self.kind != "wordpiece":
            return None
        byte_of = {char: byte for byte, char in spelling().items()}
        added = self._model.get_added_tokens_decoder()
        spelled = []
        for token, name in enumerate(self._names):
            chars = name.removeprefix(INNER) if self.kind == "wordpiece" else name
            if token in added or not all(char in byte_of for char in chars):
                spelled.append(b"" if token in self._special else name.encode())
            else:
                spelled.append(bytes(byte_of[char] for char in chars))
        return spelled

    def _first_of(self, *groups: Sequence[str]) -> int:
        return next(self._names.index(n) for names in groups for n in names if n in self._names)

    def _n_bytes(self, token: int) -> int:
        """What the token adds to a text that goes on."""
        if token in self._special or not self._names[token]:
            return 0
        if BYTE_TOKEN.fullmatch(self._names[token]):
            return 1
        before = self._anchor
        both = self._model.decode([before, token], skip_special_tokens=True)
        alone = self._model.decode([before], skip_special_tokens=True)
        return max(0, len(both.encode()) - len(alone.encode()))

    @cached_property
    def _anchor(self) -> int:
        """A token to put before another: the first that is a plain letter."""
        letters = [t for t, name in enumerate(self._names) if name.isalpha() and name.isascii()]
        return letters[0] if letters else self.vocab_size - 1


def _read(content: str) -> Any:
    """The library's tokenizer; texts that look like a special token are text to it."""
    library = _library()
    try:
        model = library.Tokenizer.from_str(content)
    except BaseException as error:  # the library raises nothing narrower; its panics are wider
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(f"tokenizer: not a tokenizer.json ({error})") from error
    if not model.get_vocab_size():
        raise ValueError("tokenizer: it has no tokens")
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    return model


def _scalars(text: str) -> str:
    """`text` with half characters, which the library cannot take, as U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _learn_bpe(library: Any, texts: Iterator[str], vocab_size: int) -> Any:
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        show_progress=False,
        initial_alphabet=sorted(spelling().values()),
    )
    model.train_from_iterator(texts, trainer)
    return model


def _learn_wordpiece(library: Any, texts: Iterator[str], vocab_size: int) -> Any:
    """WordPiece over bytes. Each of them is a token at the start of a word and one inside it, so
    that no word is unknown; the learned pieces come after."""
    pre, regex = library.pre_tokenizers, library.Regex
    splits = pre.Sequence(
        [
            pre.ByteLevel(add_prefix_space=False),
            pre.Split(regex(f".{{1,{MAX_WORD_BYTES}}}"), "isolated"),
        ]
    )
    alphabet = sorted(spelling().values())
    inner = [INNER + char for char in alphabet]
    learner = library.Tokenizer(library.models.WordPiece({UNK: 0}, unk_token=UNK))
    learner.pre_tokenizer = splits
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, *inner],  # named, so that their order is fixed
        initial_alphabet=alphabet,
        continuing_subword_prefix=INNER,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    first = [BOS, EOS, UNK, *alphabet, *inner]
    names = list(dict.fromkeys([*first, *(name for name, _ in learned)]))[:vocab_size]
    pieces = library.models.WordPiece(
        {name: token for token, name in enumerate(names)},
        unk_token=UNK,
        continuing_subword_prefix=INNER,
        max_input_chars_per_word=MAX_WORD_BYTES,
    )
    model = library.Tokenizer(pieces)
    model.pre_tokenizer = splits
    strip = library.decoders.Replace(regex(f"^{INNER}"), "")
    model.decoder = library.decoders.Sequence([strip, library.decoders.ByteLevel()])
    model.add_special_tokens([BOS, EOS, UNK])
    return model


class StreamDecoder:
    """Decode the last few tokens with and without the new one, and give the difference once it
    holds no half character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._n_shown = 0  # of the ids kept, those whose text was given

    def __call__(self, token: int) -> str:
        self._ids.append(token)
        shown, grown = self._decode(self._ids[: self._n_shown]), self._decode(self._ids)
        if len(grown) <= len(shown) or grown.endswith("\ufffd"):
            return ""
        self._ids, self._n_shown = self._ids[self._n_shown :], len(self._ids) - self._n_shown
        return grown[len(shown) :]
