"""Convert our tokenizers to the tokenizer.json that other programs read.

A character vocabulary becomes a word vocabulary of single characters; if it has no unknown token, a
normalizer removes unknown characters. Other tokenizers are a tokenizer.json already.

Text that looks like a special token is encoded as text, as it is here. In a dialogue the special
tokens are part of the text that the template writes. There it puts a mark into whatever could be a
special token in a message, and the tokenizer removes the mark after it has looked for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.dialogue import CHAT_TEMPLATE, has_dialogue
from mlx_randygpt.tokenizers import (
    DIALOGUE_TOKENS,
    NO_TOKEN,
    Tokenizer,
    stops,
    tokenizer_from_json,
)
from mlx_randygpt.tokenizers.chars import UNK, CharTokenizer, FixedCharTokenizer

BEGIN = "mlxgpt_begin"  # of tokenizer_config.json: the id that stands for an empty prompt
ANY_CHARACTER = r"[\s\S]"
MARK = "\ufdd0"  # no character: no text contains it
UNMARK = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
CONTENT = "message['content']"  # in CHAT_TEMPLATE, the text of a message
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # one continuous text
)


def tokenizer_files(data: dict[str, Any], model: ModelConfig) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json for the JSON of `Tokenizer.to_json`."""
    tokenizer = tokenizer_from_json(data)
    content = tokenizer_json(tokenizer)
    names = token_names(content)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # in text, they are text
        "chat_template": PLAIN_TEMPLATE,
    }
    if has_dialogue(tokenizer):
        settings |= {"split_special_tokens": False, "chat_template": marking_template(content)}
        content = with_marks(content)
    if tokenizer.eos != NO_TOKEN:
        settings["bos_token"] = names[tokenizer.bos]
    if ends := stops(tokenizer):
        settings |= dict.fromkeys(("eos_token", "pad_token"), names[ends[0]])
    if isinstance(tokenizer, FixedCharTokenizer) and tokenizer.begin != NO_TOKEN:
        settings[BEGIN] = tokenizer.begin
    if model.position == "learned":
        settings["model_max_length"] = model.block_size
    if (unknown := content["model"].get("unk_token")) in names.values():
        settings["unk_token"] = unknown
    return {"tokenizer.json": as_json(content), "tokenizer_config.json": as_json(settings)}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer in the format of the library `tokenizers`."""
    if isinstance(tokenizer, FixedCharTokenizer):
        ids = {symbol: token for token, symbol in enumerate(tokenizer.symbols) if symbol}
        listed = "".join(f"\\x{{{ord(symbol):X}}}" for symbol in ids)
        special = DIALOGUE_TOKENS * tokenizer.dialogue
        ids |= {name: tokenizer.special(name) for name in special}
        others = {"type": "Replace", "pattern": {"Regex": f"[^{listed}]"}, "content": ""}
        return _characters(ids, special, others)
    if isinstance(tokenizer, CharTokenizer):
        words = [*tokenizer.chars, *tokenizer.specials]
        ids = {word: token for token, word in enumerate(words)}
        return _characters(ids, tokenizer.specials, None)
    content: dict[str, Any] = tokenizer.to_json()["tokenizer"]
    return content


def _characters(
    ids: dict[str, int], special: Sequence[str], normalizer: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a tokenizer.json whose words are single characters."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[name], "content": name, **plain, "special": True} for name in special
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": ANY_CHARACTER},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": UNK},
    }


def marking_template(content: dict[str, Any]) -> str:
    """Return CHAT_TEMPLATE with a mark in each message after what begins a special token."""
    begins = {token["content"][0] for token in content["added_tokens"] if token["special"]}
    marked = CONTENT
    for char in sorted(begins):
        marked += f" | replace({char!r}, {char + MARK!a})"
    return CHAT_TEMPLATE.replace(f"+ {CONTENT} +", f"+ ({marked}) +")


def with_marks(content: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that removes MARK from the text between special tokens."""
    rules = [UNMARK, content["normalizer"]] if content["normalizer"] else [UNMARK]
    sequence = {"type": "Sequence", "normalizers": rules}
    return content | {"normalizer": sequence if len(rules) > 1 else UNMARK}


def without_marks(content: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of which `with_marks` returned this one, or this one."""
    normalizer = content.get("normalizer")
    if normalizer == UNMARK:
        return content | {"normalizer": None}
    rules = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    if isinstance(rules, list) and len(rules) == 2 and rules[0] == UNMARK:
        return content | {"normalizer": rules[1]}
    return content


def token_names(content: dict[str, Any]) -> dict[int, str]:
    """Return id -> the name of the token in a tokenizer.json."""
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((v[0], i) for i, v in enumerate(vocab))
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    return {token: name for name, token in pairs} | added


def as_json(value: Any) -> bytes:
    """Return a value as indented JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
