"""Subwords spell every text, agree with the library they come from, and stream whole characters."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.config import ConfigError
from mlx_randygpt.data.files import sample_corpus_path
from mlx_randygpt.tokenizers import subword, tokenizer_from_json
from mlx_randygpt.tokenizers.subword import KINDS, MIN_VOCAB_SIZE, SubwordTokenizer, byte_characters

tokenizers = pytest.importorskip("tokenizers")
hypothesis = pytest.importorskip("hypothesis")

STRANGE = "naïve 龍🐉 ##re ⋯re <bos><eos><unk>\r\n\t  \x00 don't 12345 " + "x" * 300
LEARNED: dict[str, SubwordTokenizer] = {}


@pytest.fixture(scope="module")
def text() -> str:
    """The sample corpus: more words than a vocabulary of these tests has room for."""
    return sample_corpus_path().read_text()


@pytest.fixture(params=KINDS)
def learned(request: pytest.FixtureRequest, text: str) -> SubwordTokenizer:
    kind = str(request.param)
    if kind not in LEARNED:
        LEARNED[kind] = SubwordTokenizer.train(kind, [text], 600)
    return LEARNED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = LEARNED.setdefault(kind, SubwordTokenizer.train(kind, [text], 600))

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @hypothesis.given(hypothesis.strategies.text())
    def holds(any_text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(any_text)) == any_text

    holds()
    assert tokenizer.decode(tokenizer.encode(STRANGE)) == STRANGE


def test_half_a_surrogate_becomes_the_replacement_character(learned: SubwordTokenizer) -> None:
    assert learned.decode(learned.encode("a\ud83d!")) == "a\ufffd!"


def test_ids_and_text_are_those_of_the_library(learned: SubwordTokenizer, text: str) -> None:
    library = tokenizers.Tokenizer.from_str(learned.content)
    library.encode_special_tokens = True
    for one in (text, STRANGE):
        ids = library.encode(one, add_special_tokens=False).ids
        assert learned.encode(one).tolist() == ids
        assert learned.decode(ids) == library.decode(ids)


def test_a_learned_vocabulary_is_used_and_the_same_each_time(
    learned: SubwordTokenizer, text: str
) -> None:
    ids = learned.encode(text)
    assert learned.vocab_size == 600
    assert 0 <= ids.min() <= ids.max() < 600
    assert len(ids) < len(text) / 1.5
    assert SubwordTokenizer.train(learned.kind, [text], 600) == learned


def test_no_half_character_is_ever_shown(learned: SubwordTokenizer) -> None:
    decoder, shown = learned.decoder(), ""
    for token in learned.encode("naïve 龍🐉👩‍👩‍👧 é").tolist():
        shown += (new := decoder(token))
        assert "\ufffd" not in new
    assert shown == "naïve 龍🐉👩‍👩‍👧 é"


def test_token_bytes_add_up_to_the_text(learned: SubwordTokenizer) -> None:
    sizes = learned.token_bytes()
    assert sizes.shape == (learned.vocab_size,)
    assert sizes[learned.encode(STRANGE)].sum() == len(STRANGE.encode())
    assert sizes[learned.bos] == sizes[learned.eos] == 0


def test_special_tokens_are_never_sampled_but_for_the_end(learned: SubwordTokenizer) -> None:
    assert learned.bos in learned.never_sampled()
    assert learned.eos not in learned.never_sampled()
    assert learned.decode([learned.bos, *learned.encode("hi"), learned.eos]) == "hi"


def test_json_gives_an_equal_tokenizer_back(learned: SubwordTokenizer, text: str) -> None:
    back = tokenizer_from_json(json.loads(json.dumps(learned.to_json(), sort_keys=True)))
    assert back == learned
    assert np.array_equal(back.encode(text), learned.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_vocabulary_holds_every_byte(kind: str) -> None:
    tokenizer = SubwordTokenizer.train(kind, ["abc"], MIN_VOCAB_SIZE[kind])
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE[kind]
    assert tokenizer.decode(tokenizer.encode(STRANGE)) == STRANGE
    with pytest.raises(ConfigError, match=f"vocab_size=200 does not fit a {kind} tokenizer"):
        SubwordTokenizer.train(kind, ["abc"], 200)


def test_the_spelling_of_bytes_is_that_of_gpt2() -> None:
    table = byte_characters()
    assert len(set(table.values())) == 256
    assert sorted(table.values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (table[ord("A")], table[ord(" ")], table[ord("\n")]) == ("A", "Ġ", "Ċ")


def byte_level(vocab: dict[str, int]) -> Any:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


def test_a_file_like_gpt2s_begins_and_ends_documents_with_one_token() -> None:
    vocab = {char: i for i, char in enumerate(byte_characters().values())} | {"<|endoftext|>": 256}
    tokenizer = SubwordTokenizer.from_file(byte_level(vocab).to_str())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (256, 256, 257)
    assert tokenizer.never_sampled() == ()
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


def test_a_file_without_special_tokens_gets_one() -> None:
    vocab = {char: i for i, char in enumerate(byte_characters().values())}
    tokenizer = SubwordTokenizer.from_file(byte_level(vocab).to_str())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (256, 256, 257)


@pytest.fixture
def words() -> SubwordTokenizer:
    """A tokenizer.json whose tokens depend on their neighbours and which does not know all."""
    model = tokenizers.models.WordPiece(
        {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "sat": 4}, unk_token="[UNK]"
    )
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    return SubwordTokenizer.from_file(library.to_str())


def test_a_foreign_tokenizer_streams_what_it_decodes(words: SubwordTokenizer) -> None:
    ids = words.encode("the cats sat").tolist()
    decoder: Callable[[int], str] = words.decoder()
    assert [decoder(token) for token in ids] == ["the", " cat", "s", " sat"]
    assert words.decode(ids) == "the cats sat"
    assert words.token_bytes()[[2, 3, 4]].tolist() == [4, 1, 4]  # with the space before


def test_what_a_foreign_tokenizer_loses_is_counted(words: SubwordTokenizer) -> None:
    assert words.unknown("the dog sat on the dog") == {"dog": 2, "on": 1}
    assert 0 in words.never_sampled()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "bpe"}, "None is not the JSON of a bpe"),
        ({"type": "bpe", "tokenizer": {}}, "not a tokenizer.json"),
        (
            {"type": "sentence"},
            "type='sentence' is unknown; choose from char, bpe, wordpiece, file",
        ),
    ],
)
def test_damaged_json_is_refused_with_the_reason(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_json(data)


NO_SPACES = {
    "dna": "".join(random.Random(1).choices("ACGT", k=250_000)),
    "chinese": "".join(random.Random(1).choices([chr(0x4E00 + i) for i in range(500)], k=80_000)),
    "minified": "f(a,b){c=1};" * 20_000,
    "blank": " " * 200_000,
    "digits": "0123456789" * 20_000,
}


@pytest.mark.parametrize("name", NO_SPACES)
def test_text_without_spaces_is_cut_to_learn(name: str) -> None:
    """Words of 250,000 characters took 42 s, quadratic in their length; pieces take about 2 s."""
    runs = list(subword._cut_long_runs(NO_SPACES[name]))
    assert "".join(runs) == NO_SPACES[name]
    assert max(map(len, runs)) <= subword.MAX_RUN
    if name in ("dna", "chinese"):
        tokenizer = SubwordTokenizer.train("bpe", [NO_SPACES[name]], 500)
        assert tokenizer.decode(tokenizer.encode(NO_SPACES[name])) == NO_SPACES[name]


def test_text_with_spaces_is_not_cut(text: str) -> None:
    assert list(subword._cut_long_runs(text)) == [text]


@pytest.mark.slow
def test_gpt2s_file_gives_the_ids_of_tiktoken(text: str) -> None:
    """With learned ranks in place of GPT-2's own, which do not come with this package."""
    tiktoken = pytest.importorskip("tiktoken")
    tokenizer = SubwordTokenizer.train("bpe", [text], 1000)
    byte_of = {char: byte for byte, char in byte_characters().items()}
    vocab = json.loads(tokenizer.content)["model"]["vocab"]
    ranks = {bytes(byte_of[c] for c in name): i for name, i in vocab.items() if i > 1}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    other = tiktoken.Encoding("learned", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.encode(text).tolist() == other.encode_ordinary(text)


def test_lone_surrogates_are_counted_as_lost(learned: SubwordTokenizer) -> None:
    assert list(learned.unknown("a\udc00 \ud83d\ud83db").items()) == [("\ud83d", 2), ("\udc00", 1)]
    assert learned.unknown("a\ud83d\ude00") == {}  # together they are one character
