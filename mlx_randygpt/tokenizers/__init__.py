"""Tokenizers: characters, byte-level BPE and WordPiece, behind one protocol."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.config import UserError

NO_TOKEN = -1  # stands for a token that does not exist
END_OF_TURN = "<|end|>"
DIALOGUE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN)
_CLASSES = {"char": ("chars", "CharTokenizer"), "table": ("chars", "FixedCharTokenizer")}


class TokenizerError(UserError, ValueError):
    """A tokenizer.json that is invalid, or that cannot encode a text."""


class Tokenizer(Protocol):
    """Convert text to token ids and back. Tokenizers with the same vocabulary are equal."""

    @property
    def vocab_size(self) -> int:
        """Return V, the number of ids, special tokens included."""

    @property
    def bos(self) -> int:
        """Return the id before a document, which also stands for an empty prompt."""

    @property
    def eos(self) -> int:
        """Return the id after a document, at which generation can stop.

        It is NO_TOKEN if no token ends a text; documents then follow each other directly.
        """

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of `text`, without BOS and EOS; accepts every text."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode each text; safe to call from several threads at once."""

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of `ids`; raise ValueError for an id outside the vocabulary."""

    def decoder(self) -> Callable[[int], str]:
        """Return a function from the next id to the text that it completes.

        It never returns half a character.
        """

    def unknown(self, text: str) -> dict[str, int]:
        """Count the characters that `encode` drops or replaces by `<unk>`, most frequent first."""

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the UTF-8 bytes per token, (V,); 0 for BOS and EOS, 1 for `<unk>`."""

    def never_sampled(self) -> tuple[int, ...]:
        """Return the ids that generation must not pick."""

    def special(self, name: str) -> int:
        """Return the id of the special token with this name, NO_TOKEN if there is none."""

    def with_dialogue(self) -> Tokenizer:
        """Return the tokenizer with DIALOGUE_TOKENS; those that it lacks get the next ids."""

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as JSON, for `tokenizer_from_json`."""


def tokenizer_from_json(data: object) -> Tokenizer:
    """Build the tokenizer from the result of `to_json`; raise ValueError if it is invalid."""
    if not isinstance(data, dict):
        raise ValueError(f"tokenizer: {reprlib.repr(data)} is not a JSON object")
    kind = data.get("type")
    module, name = _CLASSES.get(str(kind), ("subword", "SubwordTokenizer"))
    tokenizer: Tokenizer = getattr(import_module(f"{__name__}.{module}"), name).from_json(data)
    return tokenizer


def stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids at which generation stops: the end of a text, and that of a turn."""
    ends = tokenizer.eos, tokenizer.special(END_OF_TURN)
    return tuple(token for token in ends if token != NO_TOKEN)


def token_speller(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return a function from a token id to its text; special tokens are their names."""
    names = {tokenizer.bos: "<bos>", tokenizer.eos: "<eos>"}
    names |= {tokenizer.special(name): name for name in DIALOGUE_TOKENS}
    return lambda token: tokenizer.decode([token]) or names.get(token, "")
