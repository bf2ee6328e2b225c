"""Subword tokenizers: byte-level BPE and WordPiece, learned or from a tokenizer.json.

This module wraps the library `tokenizers` and converts its tokens to bytes. Tokenizers learned
here can encode every text, because the 256 bytes are in their vocabulary.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import LIMITS, ConfigError, UserError, missing
from mlx_randygpt.tokenizers import DIALOGUE_TOKENS, END_OF_TURN, NO_TOKEN, TokenizerError
from mlx_randygpt.tokenizers.content import check_content
from mlx_randygpt.words import count_surrogates, one_line, replace_surrogates

KINDS = ("bpe", "wordpiece")
MIN_VOCAB_SIZE = {
    "bpe": 258,
    "wordpiece": 515,
}  # the bytes (twice: initial and inner) and special tokens
DEFAULT_SIZE = 1024
BOS, EOS, UNK = "<bos>", "<eos>", "<unk>"
END_OF_TEXT = "<|endoftext|>"
BOS_NAMES = (BOS, "<s>", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", END_OF_TEXT)
EOS_NAMES = (EOS, "</s>", "<|eos|>", "<|end_of_text|>", END_OF_TEXT, "[SEP]")
INNER = "⋯"  # prefix of a WordPiece inside a word; unlike "##" it is no byte's character
MAX_WORD_BYTES = 64  # longest word for WordPiece, whose search takes cubic time
MAX_RUN = 4096  # characters; learning takes quadratic time in the length of a word
LONG_RUN = re.compile(rf"\S{{{MAX_RUN}}}(?=\S)|\s{{{MAX_RUN}}}(?=\s)")
POLL_SECONDS = 0.1  # between looks for Ctrl-C while the library learns
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's notation of a single byte


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise missing("a subword tokenizer", "tokenizers", "tokenizers") from error
    return tokenizers


def byte_characters() -> dict[int, str]:
    """Return the character of each byte in a byte-level vocabulary, as in GPT-2.

    Bytes that are printable in Latin-1 stand for themselves; the others have code points from 256.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


@dataclass(frozen=True)
class SubwordTokenizer:
    """A tokenizer.json behind the protocol `Tokenizer`."""

    kind: str  # "bpe" | "wordpiece" | "file"
    content: str  # the JSON text, as the library writes it

    @classmethod
    def train(cls, kind: str, texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
        """Learn at most `vocab_size` tokens with special ones; raise ConfigError for too few."""
        if not MIN_VOCAB_SIZE[kind] <= vocab_size <= LIMITS["vocab_size"]:
            raise ConfigError(
                f"vocab_size={vocab_size} does not fit a {kind} tokenizer; give "
                f"{MIN_VOCAB_SIZE[kind]} to {LIMITS['vocab_size']}, since every byte is a token"
            )
        learn = _learn_bpe if kind == "bpe" else _learn_wordpiece
        runs = (run for text in texts for run in _cut_long_runs(replace_surrogates(text)))
        library = _library()
        with _one_line_errors("the text cannot be learned from"):
            return cls(kind, _interruptibly(lambda: learn(library, runs, vocab_size)).to_str())

    @classmethod
    def from_file(cls, content: str) -> SubwordTokenizer:
        """Build the tokenizer from a tokenizer.json; raise ValueError if it is invalid.

        Documents begin and end with its own tokens, such as <|endoftext|> for both. If it has
        no such token, <|endoftext|> is added.
        """
        model = _read(content)
        vocab = model.get_vocab()
        names = [n for n in (*BOS_NAMES, *EOS_NAMES) if n in vocab] or [END_OF_TEXT]
        return cls("file", _with_special(model, names).to_str())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SubwordTokenizer:
        """Build the tokenizer from the result of `to_json`; raise ValueError if it is invalid."""
        kind, content = data.get("type"), data.get("tokenizer")
        if kind not in (*KINDS, "file"):
            raise ValueError(
                f"tokenizer: type={reprlib.repr(kind)} is unknown; "
                f"choose from char, {', '.join(KINDS)}, file"
            )
        if not isinstance(content, dict):
            raise ValueError(f"tokenizer: {reprlib.repr(content)} is not the JSON of a {kind}")
        return cls(str(kind), _read(json.dumps(content)).to_str())

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, special tokens included."""
        return len(self._names)

    @cached_property
    def bos(self) -> int:
        """Return the id before a document."""
        return self._first_of(BOS_NAMES, EOS_NAMES)

    @cached_property
    def eos(self) -> int:
        """Return the id after a document."""
        return self._first_of(EOS_NAMES, BOS_NAMES)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of `text`, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode each text."""
        # Unlike `encode`, the library's batch method releases Python's lock, even for one text.
        batch = [replace_surrogates(text) for text in texts]
        with _one_line_errors("the text cannot be encoded"):
            encodings = self._model.encode_batch_fast(batch, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of `ids`; raise ValueError for an id outside the vocabulary."""
        tokens = np.asarray(ids, np.int64).tolist()
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is not in 0..{self.vocab_size - 1}")
        if self._bytes is not None:
            return b"".join(map(self._bytes.__getitem__, tokens)).decode("utf-8", "replace")
        return self._decode(tokens)

    def decoder(self) -> Callable[[int], str]:
        """Return a function from the next id to the text that it completes."""
        bytes_of = self._bytes
        if bytes_of is None:
            return StreamDecoder(self.decode)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: utf8.decode(bytes_of[token])

    def unknown(self, text: str) -> dict[str, int]:
        """Count the characters that `encode` drops or replaces, most frequent first."""
        if self._bytes is not None:
            return count_surrogates(text)
        if self._unk is None:
            chars = self._characters
            return dict(Counter(c for c in text if chars and c not in chars).most_common())
        with _one_line_errors("the text cannot be encoded"):
            batch = [replace_surrogates(text)]  # see encode_batch
            [encoding] = self._model.encode_batch(batch, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return dict(Counter(text[a:b] for id_, (a, b) in pairs if id_ == self._unk).most_common())

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the UTF-8 bytes per token, (V,)."""
        if self._bytes is not None:
            return np.array([len(raw) for raw in self._bytes], np.int64)
        return np.array([self._n_bytes(token) for token in range(self.vocab_size)], np.int64)

    def never_sampled(self) -> tuple[int, ...]:
        """Return the ids that generation must not pick."""
        nameless = {token for token, name in enumerate(self._names) if not name}
        unknown = set() if self._unk is None else {self._unk}
        ends = {self.eos, self.special(END_OF_TURN)}
        return tuple(sorted((self._special | nameless | unknown | {self.bos}) - ends))

    def special(self, name: str) -> int:
        """Return the id of the special token with this name, NO_TOKEN if there is none."""
        token = self._names.index(name) if name in self._names else NO_TOKEN
        return token if token in self._special else NO_TOKEN

    def with_dialogue(self) -> SubwordTokenizer:
        """Return the tokenizer with DIALOGUE_TOKENS; those that it lacks get the next ids."""
        return replace(self, content=_with_special(_read(self.content), DIALOGUE_TOKENS).to_str())

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as JSON, for `tokenizer_from_json`."""
        return {"type": self.kind, "tokenizer": json.loads(self.content)}

    @cached_property
    def _model(self) -> Any:
        return _read(self.content)

    @cached_property
    def _names(self) -> list[str]:
        """Return the name of each token by id; "" for ids without a token."""
        vocab: dict[str, int] = self._model.get_vocab()
        names = [""] * (max(vocab.values()) + 1)
        for name, token in vocab.items():
            names[token] = name
        return names

    @cached_property
    def _special(self) -> set[int]:
        added = self._model.get_added_tokens_decoder()
        return {token for token, entry in added.items() if entry.special}

    @cached_property
    def _unk(self) -> int | None:
        name = json.loads(self.content)["model"].get("unk_token")
        return self._names.index(name) if name in self._names else None

    @cached_property
    def _characters(self) -> set[str]:
        """Return the characters that are tokens if a BPE drops all others, else an empty set."""
        content = json.loads(self.content)
        model, is_plain = content["model"], content.get("normalizer") is None
        drops = model["type"] == "BPE" and not model.get("byte_fallback")
        return set(self._names) if drops and is_plain else set()

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        """Return the bytes of each token, or None if they depend on the neighbouring tokens."""
        decoder = json.loads(self.content).get("decoder") or {}
        if decoder.get("type") != "ByteLevel" and self.kind != "wordpiece":
            return None
        byte_of = {char: byte for byte, char in byte_characters().items()}
        added = self._model.get_added_tokens_decoder()
        bytes_of = []
        for token, name in enumerate(self._names):
            chars = name.removeprefix(INNER) if self.kind == "wordpiece" else name
            if token in added or not all(char in byte_of for char in chars):
                bytes_of.append(b"" if token in self._special else name.encode())
            else:
                bytes_of.append(bytes(byte_of[char] for char in chars))
        return bytes_of

    def _first_of(self, *groups: Sequence[str]) -> int:
        return next(self._names.index(n) for names in groups for n in names if n in self._names)

    def _n_bytes(self, token: int) -> int:
        """Count the bytes that the token adds to the text before it."""
        if token in self._special or not self._names[token]:
            return 0
        if BYTE_TOKEN.fullmatch(self._names[token]):
            return 1
        before = self._anchor
        longer, shorter = self._decode([before, token]), self._decode([before])
        return max(0, len(longer.encode()) - len(shorter.encode()))

    def _decode(self, tokens: list[int]) -> str:
        with _one_line_errors("the tokens cannot be decoded"):
            [text] = self._model.decode_batch([tokens], skip_special_tokens=True)
        return str(text)

    @cached_property
    def _anchor(self) -> int:
        """Return a token to put before another: the first one that consists of letters."""
        letters = [t for t, name in enumerate(self._names) if name.isalpha() and name.isascii()]
        return letters[0] if letters else self.vocab_size - 1


def _read(content: str) -> Any:
    """Build the library's tokenizer; it encodes text that looks like a special token as text."""
    library = _library()
    with _one_line_errors("not a tokenizer.json"):
        fields = json.loads(content)
        if isinstance(fields, dict):
            check_content(fields)
        model = library.Tokenizer.from_str(content)
    if not model.get_vocab_size():
        raise TokenizerError("tokenizer: it has no tokens")
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    return model


def _with_special(model: Any, names: Sequence[str]) -> Any:
    """Make these names special tokens of the library's tokenizer, with new ids if need be."""
    token = _library().AddedToken
    model.add_special_tokens([token(name, special=True, normalized=False) for name in names])
    return model


@contextmanager
def _one_line_errors(problem: str) -> Iterator[None]:
    """Raise TokenizerError for whatever the library raises; its panics are BaseException."""
    try:
        yield
    except (UserError, OSError, MemoryError, AssertionError):
        raise  # of the texts, or our own
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        reason = str(error) if str(error).startswith("tokenizer: ") else ""
        raise TokenizerError(reason or f"tokenizer: {problem} ({one_line(error)})") from error


def _cut_long_runs(text: str) -> Iterator[str]:
    """Cut a text inside its runs of more than MAX_RUN characters with or without white space.

    Text without spaces, such as DNA, Chinese or minified code, would otherwise be one word.
    """
    start = 0
    for run in LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _interruptibly(compute: Callable[[], Any]) -> Any:
    """Return the result of `compute`, in a thread of its own so that Ctrl-C is noticed.

    The library does not look for signals. After Ctrl-C its thread ends with the process.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(compute())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
    if errors:
        raise errors[0]
    return results[0]


def _learn_bpe(library: Any, texts: Iterator[str], vocab_size: int) -> Any:
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        show_progress=False,
        initial_alphabet=sorted(byte_characters().values()),
    )
    model.train_from_iterator(texts, trainer)
    return model


def _learn_wordpiece(library: Any, texts: Iterator[str], vocab_size: int) -> Any:
    """Learn WordPiece over bytes.

    Each byte is one token at the start of a word and one inside it, so that no word is unknown; the
    learned pieces have higher ids.
    """
    pre, regex = library.pre_tokenizers, library.Regex
    splits = pre.Sequence(
        [
            pre.ByteLevel(add_prefix_space=False),
            pre.Split(regex(f".{{1,{MAX_WORD_BYTES}}}"), "isolated"),
        ]
    )
    alphabet = sorted(byte_characters().values())
    inner = [INNER + char for char in alphabet]
    learner = library.Tokenizer(library.models.WordPiece({UNK: 0}, unk_token=UNK))
    learner.pre_tokenizer = splits
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, *inner],  # listed, so that their order is fixed
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
    """Decode a stream: the text of the last few tokens with the new one, minus that without it.

    Tokens are held back while the text ends in half a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._n_shown = 0  # leading ids whose text was returned already

    def __call__(self, token: int) -> str:
        """Return the text that the token completes."""
        self._ids.append(token)
        shown, grown = self._decode(self._ids[: self._n_shown]), self._decode(self._ids)
        if len(grown) <= len(shown) or grown.endswith("\ufffd"):
            return ""
        self._ids, self._n_shown = self._ids[self._n_shown :], len(self._ids) - self._n_shown
        return grown[len(shown) :]
