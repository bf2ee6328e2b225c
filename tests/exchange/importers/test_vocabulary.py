"""Tokenizers from elsewhere: every text gets the ids that the other program gives it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from foreign_files import END, MERGES, byte_level
from hypothesis import given
from hypothesis import strategies as st

from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.exporters.tokenizer import tokenizer_json
from mlx_randygpt.exchange.importers.vocabulary import table_of_text, tokenizer_at
from mlx_randygpt.tokenizers import tokenizer_from_json
from mlx_randygpt.tokenizers.chars import CharTokenizer, FixedCharTokenizer

pytest.importorskip("tokenizers")

LETTERS = "ab \nñ"
RANDY_MERGES = [("a", "b"), (" ", "a"), ("ab", "ab"), ("b", " a"), ("ñ", "ñ"), ("x", "y")]


def randy_vocab() -> list[str]:
    merged = [left + right for left, right in RANDY_MERGES[:-1]]
    return ["<|bos|>", "<|eos|>", *LETTERS, *merged]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def randy_encode(vocab: Sequence[str], merges: Sequence[tuple[str, str]], text: str) -> list[int]:
    """As randyGPT does it: line by line; of all pairs that can be merged the one whose whole has
    the lowest id, wherever it stands, from left to right; again until there is none."""
    ids = {token: i for i, token in enumerate(vocab)}
    found: list[int] = []
    for n, line in enumerate(text.split("\n")):
        tokens = [char for char in line if char in ids]
        while True:
            able = [a + b for a, b in pairwise(tokens) if (a, b) in merges]
            if not able:
                break
            best = min(able, key=ids.__getitem__)
            out, i = [], 0
            while i < len(tokens):
                pair = tuple(tokens[i : i + 2])
                out.append(best if pair in merges and "".join(pair) == best else tokens[i])
                i += 2 if out[-1] == best and pair in merges and "".join(pair) == best else 1
            tokens = out
        found += [ids["\n"]] * (n > 0) + [ids[token] for token in tokens]
    return found


@pytest.fixture(scope="module")
def randy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("randy") / "vocab.json"
    merges = [*map(list, RANDY_MERGES)]
    content = {"vocab": randy_vocab(), "merges": [merges[2], *merges[:2], *merges[3:]]}
    return tokenizer_at(write(path, content), len(randy_vocab()))


@given(text=st.text(alphabet=LETTERS + "?", max_size=40))
def test_randygpts_bpe_gives_its_own_ids(randy: Any, text: str) -> None:
    assert randy.encode(text).tolist() == randy_encode(randy_vocab(), RANDY_MERGES, text)
    assert randy.decode(randy.encode(text)) == text.replace("?", "")
    assert randy.unknown(text) == ({"?": text.count("?")} if "?" in text else {})


def test_randygpts_bpe_begins_and_ends_with_its_own_tokens(randy: Any) -> None:
    assert (randy.bos, randy.eos, randy.vocab_size) == (0, 1, len(randy_vocab()))
    assert randy.never_sampled() == (0,)
    assert randy.token_bytes()[:8].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert tokenizer_from_json(randy.to_json()) == randy


def test_randygpts_characters_are_numbered_as_it_numbers_them(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("b<a\nb")
    table = table_of_text(tmp_path / "train.txt", 6)  # "<" and ">", then \n < a b
    assert table.encode("ab<\n").tolist() == [4, 5, 3, 2]
    assert (table.bos, table.decode([0])) == (0, "")
    with pytest.raises(
        ExchangeError, match="it has 6 characters with begin and end, and the model 7"
    ):
        table_of_text(tmp_path / "train.txt", 7)


def test_nanogpts_table_keeps_its_ids(tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"vocab_size": 3, "itos": {0: "b", 2: "\n", 1: "a"}}))
    table = tokenizer_at(path, 5)  # a model with two ids more
    assert table.encode("ab\n").tolist() == [1, 0, 2]
    assert (table.vocab_size, table.never_sampled()) == (5, (3, 4))
    path.write_bytes(pickle.dumps({"stoi": {"b": 0, "a": 1}}))
    assert tokenizer_at(path, 2).encode("ab").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"itos": {0: "a", 3: "b"}}, "gives 'b' the id 3; the model's ids are 0 to 2"),
        ({"itos": {0: "a", 1: "a"}}, "'a' occurs twice"),
        ({"itos": {0: "ab"}}, "'ab' is not one character"),
        ({"itos": {"0": "a"}}, "gives 'a' the id '0'"),
        ({"itos": {}}, "no table"),
        ({"vocab_size": 3}, "no table"),
        ([1], "no table"),
        (Path("a"), r"NEWOBJ|would run"),
    ],
)
def test_a_meta_that_does_not_fit_is_refused(tmp_path: Path, meta: Any, reason: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ExchangeError, match=reason):
        tokenizer_at(tmp_path / "meta.pkl", 3)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    write(tmp_path / "vocab.json", byte_level(261))
    (tmp_path / "merges.txt").write_text(MERGES, encoding="utf-8")
    return tmp_path


def test_gpt2s_two_files_are_its_byte_level_bpe(gpt2: Path) -> None:
    tokenizer, ids = tokenizer_at(gpt2, 261), byte_level(261)
    assert tokenizer.encode("in the é").tolist() == [
        ids["in"], ids["Ġthe"], ids["Ġ"], ids["Ã"], ids["©"],
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("in the é 😀\n")) == "in the é 😀\n"
    assert tokenizer.bos == tokenizer.eos == ids[END]


def test_the_library_of_gpt2_agrees(gpt2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer.from_pretrained(gpt2)
    for text in ("in the inn the", " the  the\n\n", "é 😀 l'he", END):
        found = tokenizer_at(gpt2, 261).encode(text).tolist()
        wanted = theirs.convert_tokens_to_ids(theirs._tokenizer.encode(text).tokens)
        assert found == wanted or text == END  # which is text to ours


def test_a_model_with_more_ids_never_writes_them(gpt2: Path) -> None:
    tokenizer = tokenizer_at(gpt2, 320)
    assert tokenizer.vocab_size == 320
    assert set(range(261, 320)) <= set(tokenizer.never_sampled())
    assert tokenizer.eos not in tokenizer.never_sampled()
    assert tokenizer.encode("<|unused_261|>").max() < 261
    assert tokenizer.token_bytes()[261:].tolist() == [0] * 59
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer


def test_a_model_with_fewer_ids_is_another(gpt2: Path) -> None:
    with pytest.raises(ExchangeError, match=r"it has 261 tokens, .* and the model 260"):
        tokenizer_at(gpt2, 260)


def test_a_tokenizer_json_comes_before_the_two_files(gpt2: Path) -> None:
    known = tokenizer_at(gpt2, 261).to_json()["tokenizer"]
    known["model"]["merges"] = []
    write(gpt2 / "tokenizer.json", known)
    assert len(tokenizer_at(gpt2, 261).encode("the")) == 3


@pytest.mark.parametrize(
    ("vocab", "merges", "reason"),
    [
        ({"a": 0, "b": 0}, "", "neither a tokenizer.json nor"),
        ({"a": "0"}, "", "neither a tokenizer.json nor"),
        ({"a": -1}, "", "neither a tokenizer.json nor"),
        ({"a": 0, "b": 1}, "a b c", "is not a pair"),
        ({"a": 0, "b": 1}, "a b", "but the result is not a token"),
        ({"vocab": ["a", 1]}, "", "not a list of texts"),
        ({"vocab": ["a", "b"]}, "", "2 tokens and the model 300"),
        ({"vocab": ["a"] * 300, "merges": [["a"]]}, "", "is not a pair"),
        ({"vocab": ["a"] * 300, "merges": {"a": 1}}, "", "is not a pair"),
        ({"model": {"type": "BPE"}}, "", "not a tokenizer.json"),
        ({"model": 5}, "", "not a tokenizer.json"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused(
    tmp_path: Path, vocab: Any, merges: str, reason: str
) -> None:
    write(tmp_path / "vocab.json", vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ExchangeError, match=reason) as caught:
        tokenizer_at(tmp_path, 300)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_vocabulary_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match=r"looked for tokenizer\.json, vocab\.json, meta\.pkl"):
        tokenizer_at(tmp_path, 3)
    write(tmp_path / "vocab.json", {"a": 0})
    with pytest.raises(ExchangeError, match=r"merges\.txt cannot be read"):
        tokenizer_at(tmp_path, 3)


CONFIG = {"added_tokens_decoder": {"261": {"content": "<tool>", "special": False},
                                   "262": {"content": "<pad>", "special": True}}}  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<pad>": 262, "<tool>": 261},
         "special_tokens_map": {"pad_token": "<pad>", "bos_token": END}},
        {"added_tokens": {"<tool>": 261, "<pad>": 262},
         "special_tokens_map": {"pad_token": {"content": "<pad>", "lstrip": False}}},
        {"added_tokens": {"<tool>": 261, "<pad>": 262},
         "special_tokens_map": {"additional_special_tokens": ["<pad>"]}},
        {"tokenizer_config": CONFIG},
        {"added_tokens": {"<tool>": 261}, "tokenizer_config": CONFIG},
    ],
)  # fmt: skip
def test_tokens_added_to_gpt2s_two_files_are_read(gpt2: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        write(gpt2 / f"{name}.json", content)
    tokenizer = tokenizer_at(gpt2, 263)
    ids = byte_level(261)
    assert tokenizer.encode("in<tool>the").tolist() == [ids["in"], 261, ids["t"], ids["he"]]
    assert tokenizer.decode([ids["in"], 261]) == "in<tool>"
    assert 262 in tokenizer.never_sampled()
    assert 261 not in tokenizer.never_sampled()
    assert tokenizer.encode("<pad>").max() < 261  # special, so text is text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens", {"<a>": 1 << 31}),
        ("added_tokens", {"<a>": 262}),
        ("added_tokens", {"<a>": "261"}),
        ("added_tokens", {"in": 261}),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<a>"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"261": "<a>"}}),
    ],
)
def test_added_tokens_that_do_not_follow_are_refused(gpt2: Path, name: str, content: Any) -> None:
    write(gpt2 / f"{name}.json", content)
    with pytest.raises(ExchangeError, match="the added token") as caught:
        tokenizer_at(gpt2, 300)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ours",
    [
        FixedCharTokenizer(("b", "\n", "a")),
        FixedCharTokenizer(("", "]", "^", "\\", "-", "é", "")),
        CharTokenizer("\nab"),
        CharTokenizer.train("<bos> é🙂"),
    ],
    ids=repr,
)
def test_exported_characters_come_back(tmp_path: Path, ours: Any) -> None:
    write(tmp_path / "tokenizer.json", tokenizer_json(ours))
    assert tokenizer_at(tmp_path, ours.vocab_size) == ours
