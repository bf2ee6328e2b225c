"""A tokenizer.json cannot make the library fill the memory: ids without gaps, texts of bounded
growth; whatever the library raises is one line."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from mlx_randygpt.config import UserError
from mlx_randygpt.tokenizers import TokenizerError, tokenizer_from_json
from mlx_randygpt.tokenizers.content import MAX_GROWTH, max_growth
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

pytest.importorskip("tokenizers")

HUGE = 1 << 31


def tokenizer_json(model: Any = None, **changes: Any) -> dict[str, Any]:
    model = model or {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    return {"version": "1.0", "added_tokens": [], "model": model, **changes}


def added(name: str, token: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": token, "content": name, **flags}


def words(vocab: Any, kind: str = "WordLevel") -> dict[str, Any]:
    return {"type": kind, "vocab": vocab, "unk_token": "a"}


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.0]]}


@pytest.mark.parametrize(
    "content",
    [
        tokenizer_json({"type": "BPE", "vocab": {"a": 0, "b": HUGE}, "merges": []}),
        tokenizer_json({"vocab": {"a": 0, "b": HUGE}, "merges": []}),  # no type: found by shape
        tokenizer_json(words({"a": 0, "b": HUGE})),
        tokenizer_json(words({"a": 0, "b": 2})),
        tokenizer_json(words({"a": 0, "b": 0})),
        tokenizer_json(words({"a": 0, "b": -1})),
        tokenizer_json(words({"a": 0, "b": 1.0})),
        tokenizer_json(words({"a": 0, "b": True})),
        tokenizer_json(words({"a": 0, "b": "1"}, "WordPiece")),
        tokenizer_json(added_tokens=[added("c", HUGE)]),
        tokenizer_json(added_tokens=[added("c", 3), added("d", 2)]),
        tokenizer_json(added_tokens=[added("a", 1)]),
        tokenizer_json(added_tokens=[added("c", None)]),
        tokenizer_json(UNIGRAM, added_tokens=[added("c", HUGE)]),
    ],
    ids=str,
)
def test_ids_are_0_to_n_minus_1(content: dict[str, Any]) -> None:
    for build in (
        lambda: SubwordTokenizer.from_file(json.dumps(content)),
        lambda: tokenizer_from_json({"type": "file", "tokenizer": content}),
    ):
        with pytest.raises(TokenizerError, match=r"has the id|have the same id") as caught:
            build()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [None, words({"a": 0, "b": 1}), UNIGRAM], ids=str)
def test_added_tokens_follow_the_others(model: Any) -> None:
    content = tokenizer_json(model, added_tokens=[added("a", 0), added("c", 2), added("d", 3)])
    tokenizer = SubwordTokenizer.from_file(json.dumps(content))
    assert tokenizer.encode("cd").tolist() == [2, 3]


def replace(pattern: Any, content: str) -> dict[str, Any]:
    key = "Regex" if isinstance(pattern, bytes) else "String"
    found = pattern.decode() if isinstance(pattern, bytes) else pattern
    return {"type": "Replace", "pattern": {key: found}, "content": content}


def sequence(*rules: Any, name: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", name: list(rules)}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
CHARSMAP = base64.b64encode((0).to_bytes(4, "little") + b"x" * 1000 + b"\0").decode()
CASED = [replace("a", "BB"), {"type": "Lowercase"}, replace("b", "aa")]
DOUBLED = [replace("a", "aa")] * 30


@pytest.mark.parametrize(
    ("place", "rule"),
    [
        ("normalizer", sequence(*DOUBLED)),
        ("normalizer", sequence(*(sequence(rule) for rule in DOUBLED))),
        ("normalizer", sequence(*[replace(b"a", "aa")] * 30)),
        ("normalizer", sequence(*[replace(b"x*", "a")] * 30)),
        ("normalizer", sequence(*[replace("", "a")] * 30)),
        ("normalizer", sequence(*[replace("a", "bb"), replace("b", "aa")] * 15)),
        ("normalizer", sequence(*CASED * 9)),
        ("normalizer", replace("a", "a" * 100)),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 100}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
        ("normalizer", sequence(*[{"type": "ByteLevel"}] * 30)),
        ("pre_tokenizer", sequence(*[BYTES] * 30, name="pretokenizers")),
        ("decoder", sequence(*DOUBLED, name="decoders")),
    ],
)
def test_rules_that_make_a_text_endless_are_refused(place: str, rule: dict[str, Any]) -> None:
    content = tokenizer_json(**{place: rule})
    with pytest.raises(TokenizerError, match=f"its {place} can make a text .* times as long"):
        SubwordTokenizer.from_file(json.dumps(content))


@pytest.mark.parametrize(
    "rules",
    [
        [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")],  # Llama
        [
            replace("``", '"'),
            replace("''", '"'),
            {"type": "NFKD"},
            replace(b" {2,}", " "),
        ],  # ALBERT
        [{"type": "NFC"}, replace(b"\\s+", " "), {"type": "Lowercase"}],  # CLIP
        [replace(" " * n, f"<|blank_{n}|>") for n in range(80, 1, -1)],
        [replace("\t", "<|tab|>"), replace("\n", "<n>"), replace("…", "...")],
    ],
)
def test_rules_of_real_tokenizers_are_accepted(rules: list[Any]) -> None:
    assert max_growth(rules) <= MAX_GROWTH


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


ENDLESS = "a" * 34 + "!"
ENDLESS_RULES = [
    {"pre_tokenizer": split("(a+)+$")},
    {"normalizer": replace(b"(a+)+$", "a")},
    {"pre_tokenizer": sequence(split("(a|aa)+$"), name="pretokenizers")},
]


@pytest.mark.parametrize("rules", ENDLESS_RULES, ids=str)
def test_a_panic_of_the_library_is_one_line(rules: dict[str, Any]) -> None:
    tokenizer = SubwordTokenizer.from_file(json.dumps(tokenizer_json(**rules)))
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["b", text])):
        with pytest.raises(UserError, match="the text cannot be encoded") as caught:
            call(ENDLESS)
        assert "\n" not in str(caught.value)
    assert tokenizer.encode("ab").tolist() == [0, 1]  # and it goes on


def test_a_decoder_that_panics_is_one_line() -> None:
    decoder = sequence({"type": "Fuse"}, replace(b"(a+)+$", "a"), name="decoders")
    tokenizer = SubwordTokenizer.from_file(json.dumps(tokenizer_json(decoder=decoder)))
    with pytest.raises(UserError, match="the tokens cannot be decoded"):
        tokenizer.decode([0] * 34 + [1])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"model": {}}'])
def test_what_is_no_tokenizer_json_is_one_line(content: str) -> None:
    with pytest.raises(UserError, match=r"not a tokenizer\.json") as caught:
        SubwordTokenizer.from_file(content)
    assert "\n" not in str(caught.value)


def test_an_error_while_texts_are_read_stays_what_it_is() -> None:
    def texts() -> Any:
        yield "abc"
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        SubwordTokenizer.train("bpe", texts(), 300)
