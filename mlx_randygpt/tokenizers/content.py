"""Check a tokenizer.json before the library reads it: token ids, and how long a text can become.

The library allocates for the largest id that a file names, and applies whatever rules the file has.
"""

from __future__ import annotations

import base64
import binascii
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_randygpt.config import LIMITS
from mlx_randygpt.tokenizers import TokenizerError

MAX_GROWTH = 32  # characters that a rule may write for one; SentencePiece's rules write 18 for ﷺ
BYTE_GROWTH = 4  # ByteLevel writes a character for each byte
LISTS = {  # where a Sequence keeps its rules
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}
ZERO_WIDTH = re.compile(r"[\^$*?|]|\{0|\{,|\\[bBAzZGKX]")  # a pattern that may match no character


def check_content(content: Mapping[str, Any]) -> None:
    """Raise TokenizerError unless the ids are 0 to n-1 and no rule makes a text much longer."""
    check_ids(content)
    for place in LISTS:
        growth = max_growth(list(_rules(content.get(place), LISTS[place])))
        if growth > MAX_GROWTH:
            raise TokenizerError(
                f"tokenizer: its {place} can make a text {growth:.3g} times as long; "
                f"at most {MAX_GROWTH} times is accepted"
            )


def check_ids(content: Mapping[str, Any]) -> None:
    """Raise TokenizerError unless ids are 0 to n-1, those of added tokens last and in order.

    What is no vocabulary at all is left to the library.
    """
    model, added = content.get("model"), content.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: the id is the position
        names = enumerate(map(_name_of, vocab))
        vocab = {name: i for i, name in names if name is not None}
    elif isinstance(vocab, dict):
        _check_vocab(vocab)
    else:
        vocab = {}
    ids, n = dict(vocab), _count(model)
    for token in added if isinstance(added, list) else []:
        name, id_ = (
            (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, 0)
        )
        if not isinstance(name, str):
            continue  # for the library to refuse
        expected = ids.setdefault(name, n)
        n += expected == n
        if type(id_) is not int or id_ != expected:
            raise TokenizerError(
                f"tokenizer: the added token {reprlib.repr(name)} has the id {reprlib.repr(id_)}, "
                f"expected {expected}; added tokens follow the others in order, without gaps"
            )
    if n > LIMITS["vocab_size"]:
        raise TokenizerError(
            f"tokenizer: it has {n:,} tokens; at most {LIMITS['vocab_size']:,} are possible"
        )


def _count(model: Any) -> int:
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return len(vocab) if isinstance(vocab, list | dict) else 0


def _name_of(entry: Any) -> str | None:
    return entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else None


def _check_vocab(vocab: Mapping[str, Any]) -> None:
    seen: dict[int, str] = {}
    for name, id_ in vocab.items():
        if type(id_) is not int or not 0 <= id_ < len(vocab):
            raise TokenizerError(
                f"tokenizer: the token {reprlib.repr(name)} has the id {reprlib.repr(id_)}; "
                f"the ids of {len(vocab):,} tokens are 0 to {len(vocab) - 1}"
            )
        if id_ in seen:
            raise TokenizerError(
                f"tokenizer: the tokens {reprlib.repr(seen[id_])} and {reprlib.repr(name)} "
                f"have the same id {id_}"
            )
        seen[id_] = name


def max_growth(rules: list[Mapping[str, Any]]) -> float:
    """Return how many characters these rules, one after the other, can make of one.

    A rule that writes many characters multiplies what an earlier one wrote only if its pattern can
    match that. Unicode's own forms, such as NFKC and lower case, are not counted.
    """
    written: list[tuple[set[str] | None, float]] = []  # characters (None: any) and their growth
    largest = 1.0
    for rule in rules:
        matched, output, factor = _effect(rule)
        before = [1.0]
        for chars, growth in written:
            if matched is None or chars is None or matched & chars:
                before.append(growth)
        growth = max(before) * factor
        largest = max(largest, growth)
        if output is None:  # characters may have become others
            written = [(None, largest)]
        else:
            written.append((output, growth))
    return largest


def _effect(rule: Mapping[str, Any]) -> tuple[set[str] | None, set[str] | None, float]:
    """Return the characters a rule may match, those it writes, and characters written per matched.

    None stands for any character.
    """
    kind = rule.get("type")
    if kind == "Replace":
        content, pattern = str(rule.get("content", "")), rule.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(found, str) and found:
            return set(found), set(content), max(1.0, len(content) / len(found))
        expression = str(pattern.get("Regex", "")) if isinstance(pattern, dict) else ""
        per_gap = content and (not expression or ZERO_WIDTH.search(expression))
        return None, set(content), float(max(1, len(content) + bool(per_gap)))
    if kind == "Prepend":  # before each piece of a text, which may be one character
        prefix = str(rule.get("prepend", ""))
        return None, set(prefix), 1.0 + len(prefix)
    if kind == "ByteLevel":
        return None, None, float(BYTE_GROWTH)
    if kind == "Precompiled":
        return None, None, _longest_replacement(rule.get("precompiled_charsmap"))
    if kind in ("Strip", "StripAccents"):
        return set(), set(), 1.0
    return set(), None, 1.0


def _longest_replacement(charsmap: Any) -> float:
    """Return the characters of the longest replacement in SentencePiece's table.

    The table is base64: 4 bytes with the length of an index, the index, texts that end in NUL.
    """
    try:
        table = base64.b64decode(charsmap or "")
    except (TypeError, ValueError, binascii.Error):
        return 1.0  # the library refuses it
    texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    return float(max(1, *(len(text.decode("utf-8", "replace")) for text in texts)))


def _rules(rule: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rules of a possibly nested Sequence in order."""
    waiting = [rule]
    while waiting:
        rule = waiting.pop()
        inner = rule.get(name) if isinstance(rule, dict) else None
        if isinstance(inner, list):
            waiting += reversed(inner)
        elif isinstance(rule, dict):
            yield rule
