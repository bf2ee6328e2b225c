"""A table of characters from elsewhere: its ids stay, and nothing stands around its text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlx_randygpt.backends.base import Backend
from mlx_randygpt.data.corpus import encode_corpus
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate
from mlx_randygpt.tokenizers import NO_TOKEN, Tokenizer, token_speller, tokenizer_from_json
from mlx_randygpt.tokenizers.chars import FixedCharTokenizer
from mlx_randygpt.training.loop import Run

TABLE = FixedCharTokenizer(("z", "\n", "", "a", "é"))


def test_ids_are_those_of_the_table() -> None:
    tokenizer: Tokenizer = TABLE
    assert tokenizer.encode("aéz\n").tolist() == [3, 4, 0, 1]
    assert tokenizer.encode("a").dtype == np.int32
    assert tokenizer.decode([3, 4, 0, 2]) == "aéz"
    assert tokenizer.vocab_size == 5
    assert tokenizer.token_bytes().tolist() == [1, 1, 0, 1, 2]


def test_what_is_not_in_the_table_is_left_out_and_counted() -> None:
    assert TABLE.encode("qa😀qz").tolist() == [3, 0]
    assert TABLE.unknown("qa😀qz") == {"q": 2, "😀": 1}
    assert [ids.tolist() for ids in TABLE.encode_batch(["qa", "", "z"])] == [[3], [], [0]]


def test_a_newline_begins_a_text_and_nothing_ends_it() -> None:
    assert (TABLE.bos, TABLE.eos) == (1, NO_TOKEN)
    assert FixedCharTokenizer(("", "b", " ")).bos == 2
    assert FixedCharTokenizer(("", "b", "c")).bos == 1
    assert FixedCharTokenizer(("", "b", "\n"), begin=0).bos == 0


def test_documents_follow_each_other_as_they_are() -> None:
    corpus = encode_corpus({"one": "az\n", "two": "é"}, TABLE)
    assert corpus.tokens.tolist() == [3, 0, 1, 4]
    assert corpus.starts.tolist() == [0, 3]


def test_json_brings_it_back() -> None:
    for table in (TABLE, FixedCharTokenizer(("a", "b"), begin=1)):
        assert tokenizer_from_json(table.to_json()) == table


@pytest.mark.parametrize(
    ("symbols", "begin", "reason"),
    [
        ((), NO_TOKEN, "no characters"),
        (("", ""), NO_TOKEN, "no characters"),
        (("a", "ab"), NO_TOKEN, "'ab' is not one character"),
        (("a", "b", "a"), NO_TOKEN, "'a' occurs twice"),
        (("\ud800",), NO_TOKEN, "lone surrogate"),
        (("a",), 1, r"begin=1 is not in 0\.\.0"),
        (("a",), -2, "begin=-2"),
    ],
)
def test_a_table_that_is_none_is_refused(symbols: tuple[str, ...], begin: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FixedCharTokenizer(symbols, begin)


@pytest.mark.parametrize(
    "data", [{"symbols": "ab"}, {"symbols": [1]}, {"symbols": ["a"], "begin": True}]
)
def test_json_of_another_shape_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="tokenizer: "):
        tokenizer_from_json({"type": "table", **data})


def test_ids_outside_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"token id 5 is not in 0\.\.4"):
        TABLE.decode([0, 5])


def test_a_model_writes_only_what_has_a_text(
    make_run: Callable[..., tuple[Run, Backend]],
) -> None:
    run, backend = make_run("classic")
    symbols = tuple(chr(97 + i) if i % 2 else "" for i in range(run.model.vocab_size))
    config = SampleConfig(max_tokens=40, temperature=2.0, top_p=1.0)
    table = FixedCharTokenizer(symbols)
    *_, [sample] = generate(backend, run.model, table, [table.bos], config)
    assert len(sample.text) == len(sample.ids) == 40  # nothing ended it
    assert all(symbols[i] for i in sample.ids)


def test_a_newline_that_begins_is_still_spelled_as_a_newline() -> None:
    name = token_speller(TABLE)
    assert (name(1), name(0)) == ("\n", "z")
