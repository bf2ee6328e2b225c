"""Blocks of tokens are those of the whole text, in order, whatever the threads and the pieces."""

from hashlib import sha256

import numpy as np
import pytest

from mlx_randygpt.data.encoding import TextStats, blocks
from mlx_randygpt.data.reading import _cut
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.tokenizers.subword import SubwordTokenizer


def encoded(
    texts: list[str], tokenizer: Tokenizer, size: int, threads: int
) -> tuple[list[int], TextStats]:
    pieces = [piece for text in texts for piece in _cut(iter([text]), size)]
    found = TextStats()
    return np.concatenate([*blocks(pieces, tokenizer, found, threads)]).tolist(), found


def expected(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    ids = list[int]()
    for text in texts:
        ids += [tokenizer.bos, *tokenizer.encode(text).tolist(), tokenizer.eos]
    return ids


@pytest.mark.parametrize("size", [40, 1000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_and_threads_change_nothing(text: str, size: int, threads: int) -> None:
    texts = [text, "a short one", text[::-1]]
    tokenizer = CharTokenizer.train(texts)
    ids, found = encoded(texts, tokenizer, size, threads)
    assert ids == expected(texts, tokenizer)
    assert found.starts.tolist() == [0, len(text) + 2, len(text) + 15]
    assert found.n_tokens == len(ids)
    assert found.digest.hexdigest() == sha256("\0".join(texts).encode()).hexdigest()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@pytest.mark.parametrize("size", [40, 333])
def test_a_piece_ends_where_no_subword_crosses(text: str, kind: str, size: int) -> None:
    pytest.importorskip("tokenizers")
    texts = [text, "don't  stop,\n\n  here 12345 !!! " * 20]
    tokenizer = SubwordTokenizer.train(kind, texts, 700)
    assert encoded(texts, tokenizer, size, 2)[0] == expected(texts, tokenizer)


def test_one_token_may_begin_and_end_documents() -> None:
    class Single(CharTokenizer):
        @property
        def eos(self) -> int:
            return self.bos

    ids, _ = encoded(["ab", "b"], Single("ab"), 9, 1)
    assert ids == [2, 0, 1, 2, 1]


def test_what_is_not_known_is_counted() -> None:
    _, found = encoded(["abcab", "cd ROMEO: d"], CharTokenizer(" :EMORab"), 4, 2)
    assert found.unknown == {"c": 2, "d": 2}
    assert found.characters == 16
