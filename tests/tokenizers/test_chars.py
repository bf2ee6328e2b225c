"""One character, one token: nothing is lost but what `unknown` counts."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.tokenizers import Tokenizer, tokenizer_from_json
from mlx_randygpt.tokenizers.chars import CharTokenizer

TEXT = "héllo, wörld 😀\n→ ok"


def test_ids_are_sorted_characters_then_bos_eos_unk() -> None:
    tokenizer: Tokenizer = CharTokenizer.train("banana")
    assert tokenizer.encode("abnz").tolist() == [0, 1, 2, 5]
    assert tokenizer.encode("abn").dtype == np.int32
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (3, 4, 6)
    assert tokenizer.never_sampled() == (3, 5)


def test_decode_undoes_encode() -> None:
    tokenizer = CharTokenizer.train(TEXT)
    assert tokenizer.chars == "".join(sorted(set(TEXT)))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode("")) == ""


def test_specials_decode_to_nothing_and_unknowns_to_the_replacement_character() -> None:
    tokenizer = CharTokenizer.train("ab")
    assert tokenizer.decode([tokenizer.bos, 0, tokenizer.unk, 1, tokenizer.eos]) == "a\ufffdb"


@pytest.mark.parametrize("ids", [[-1], [0, 5]])
def test_decode_refuses_ids_outside_the_vocabulary(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"token id {ids[-1]} is not in 0\.\.4"):
        CharTokenizer.train("ab").decode(ids)


def test_the_rarest_characters_become_unknown_and_ties_keep_the_lower_code_point() -> None:
    tokenizer = CharTokenizer.train(["zzzcc", "bbaad"], max_chars=3)
    assert tokenizer.chars == "abz"
    assert tokenizer.unknown("cdcabz😀") == {"c": 2, "d": 1, "😀": 1}
    assert tokenizer.unknown("abz") == {}


def test_a_vocabulary_holds_512_characters_at_most() -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 600))) + "abc" * 2
    tokenizer = CharTokenizer.train(text)
    assert len(tokenizer.chars) == 512
    assert tokenizer.chars.startswith("abc\u4e00")
    with pytest.raises(ValueError, match=r"max_chars=513 is not in 1\.\.512"):
        CharTokenizer.train(text, max_chars=513)


def test_what_was_counted_agrees_with_a_counter() -> None:
    text = (TEXT + "etaoin") * 3
    kept = sorted(Counter(text).items(), key=lambda item: (-item[1], item[0]))[:7]
    tokenizer = CharTokenizer.train(text, max_chars=7)
    assert tokenizer.chars == "".join(sorted(char for char, _ in kept))
    assert sum(tokenizer.unknown(text).values()) == len(text) - sum(n for _, n in kept)


def test_lone_surrogates_are_unknown_characters() -> None:
    tokenizer = CharTokenizer.train("a\ud800\udfff")
    assert tokenizer.chars == "a"
    assert tokenizer.decode(tokenizer.encode("a\udcff")) == "a\ufffd"
    assert tokenizer.unknown("\udcff\udcff") == {"\udcff": 2}


def test_token_bytes_add_up_to_the_encoded_text() -> None:
    tokenizer = CharTokenizer.train(TEXT)
    size = tokenizer.token_bytes()
    assert size.shape == (tokenizer.vocab_size,)
    assert size[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())
    assert size[-3:].tolist() == [0, 0, 1]


def test_json_gives_an_equal_tokenizer_back() -> None:
    tokenizer = CharTokenizer.train(TEXT)
    back = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert back == tokenizer != CharTokenizer.train(TEXT + "!")
    assert np.array_equal(back.encode(TEXT), tokenizer.encode(TEXT))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"\[\] is not a JSON object"),
        ({"type": "bytes"}, "type='bytes' is unknown"),
        ({"type": "char"}, "chars=None is not a list"),
        ({"type": "char", "chars": "abc"}, "chars='abc' is not a list"),
        ({"type": "char", "chars": ["a", 7]}, r"chars\[1\]=7 is not one character"),
        ({"type": "char", "chars": ["ab"]}, r"chars\[0\]='ab' is not one character"),
        ({"type": "char", "chars": ["a", "a"]}, "'a' occurs twice"),
        ({"type": "char", "chars": ["b", "a"]}, "'b' comes before 'a', out of order"),
        ({"type": "char", "chars": ["\ud83d"]}, "lone surrogate"),
        ({"type": "char", "chars": []}, "0 characters; 1 to 512 are possible"),
        (
            {"type": "char", "chars": [*map(chr, range(513))]},
            "513 characters; 1 to 512 are possible",
        ),
    ],
)
def test_damaged_json_is_refused_with_the_reason(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_json(data)
