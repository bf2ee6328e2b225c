"""Tokens decoded again in pieces: whole characters, whole documents, every tokenizer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_randygpt.data.corpus import encode_corpus
from mlx_randygpt.data.decoding import decoded
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import CharTokenizer, FixedCharTokenizer
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

LETTERS = "ab é漢🙂\n"
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer.train(LETTERS),
    "table": FixedCharTokenizer(tuple(LETTERS)),
    "bpe": SubwordTokenizer.train("bpe", [LETTERS * 3], 270),
    "wordpiece": SubwordTokenizer.train("wordpiece", [LETTERS * 3], 530),
}


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece"])
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(LETTERS, max_size=40), min_size=1, max_size=4), size=st.integers(1, 9)
)
def test_pieces_add_up_to_the_documents(kind: str, texts: list[str], size: int) -> None:
    names = {str(i): text for i, text in enumerate(texts)}
    tokens = encode_corpus(names, TOKENIZERS[kind]).tokens
    pieces = list(decoded(tokens, TOKENIZERS[kind], size))
    begins = [i for i, piece in enumerate(pieces) if piece.begins]
    documents = [
        "".join(piece.text for piece in pieces[i:j]) for i, j in pairwise([*begins, len(pieces)])
    ]
    assert documents == [text for text in texts if text]
    assert not begins or begins[0] == 0


def test_without_a_token_for_the_end_it_is_one_document() -> None:
    tokens = TOKENIZERS["table"].encode(text := LETTERS * 9)
    pieces = list(decoded(tokens, TOKENIZERS["table"], 8))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)


def test_tokens_that_are_no_text_decode_as_a_whole() -> None:
    tokenizer = TOKENIZERS["bpe"]
    tokens = np.random.default_rng(1).integers(2, tokenizer.vocab_size, 500)
    text = "".join(piece.text for piece in decoded(tokens, tokenizer, 500))
    assert text == tokenizer.decode(tokens)
