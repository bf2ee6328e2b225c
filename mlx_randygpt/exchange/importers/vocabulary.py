"""Import tokenizers: GPT-2's files, nanoGPT's meta.pkl, randyGPT's vocab.json.

All ids are kept. If a model has more ids than its tokenizer, the others get the names of unused
special tokens, which are never generated.
"""

from __future__ import annotations

import contextlib
import json
import reprlib
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.exporters.tokenizer import BEGIN, tokenizer_json, without_marks
from mlx_randygpt.exchange.importers.tensors import MAX_JSON_BYTES, read_json
from mlx_randygpt.exchange.importers.torch_file import MAX_PICKLE_BYTES, read_pickle
from mlx_randygpt.files import is_file, is_folder, open_to_read, read_text
from mlx_randygpt.tokenizers import DIALOGUE_TOKENS, NO_TOKEN, Tokenizer
from mlx_randygpt.tokenizers.chars import SPECIALS, CharTokenizer, FixedCharTokenizer
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

FILES = ("tokenizer.json", "vocab.json", "meta.pkl")  # names to try in a folder, in this order
RANDY_SPECIAL = ("<|bos|>", "<|eos|>")
ADDED_FILES = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token
PLAIN = dict.fromkeys(FLAGS, False)
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def tokenizer_at(path: Path, size: int) -> Tokenizer:
    """Read the tokenizer in a file or folder, for a model with `size` ids."""
    if is_folder(path):
        file = next((path / name for name in FILES if is_file(path / name)), None)
        if file is None:
            raise ExchangeError(f"{path} holds no tokenizer; looked for {', '.join(FILES)}")
        path = file
    if path.suffix == ".pkl":
        return _call_for(path, lambda: _table_of_meta(path, size))
    content = without_marks(read_json(path))
    if isinstance(content.get("vocab"), list):
        return _call_for(path, lambda: _of_randygpt(content, size))
    if "model" not in content:
        content = _byte_level(content, path)
    if characters := _characters(content, size, path.with_name("tokenizer_config.json")):
        return characters
    return _call_for(path, lambda: _subword(content, size))


def byte_level_bpe(
    path: Path,
    names: Sequence[str],
    merges: Sequence[Sequence[str]],
    added: Mapping[int, str],
    special: Container[int],
) -> Tokenizer:
    """Build GPT-2's kind of BPE from the names of all ids, its merges and the added tokens.

    `special` are the ids of added tokens that have no text.
    """
    if len(set(names)) < len(names):
        raise ExchangeError(f"{path} has two tokens of one name")
    content = _bpe({name: i for i, name in enumerate(names)}, merges, BYTE_LEVEL, BYTE_LEVEL)
    content["added_tokens"] = [
        {"id": i, "content": name, **PLAIN, "special": i in special} for i, name in added.items()
    ]
    return _call_for(path, lambda: _subword(content, len(names)))


def _characters(content: Mapping[str, Any], size: int, config: Path) -> Tokenizer | None:
    """Return the character tokenizer of which this tokenizer.json is an export, else None.

    `config` is the tokenizer_config.json beside it, which records where a text begins.
    """
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "WordLevel":
        return None
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        return None
    symbols = [""] * size
    for name, token in vocab.items():
        if type(token) is not int or not 0 <= token < size:
            return None
        symbols[token] = name
    begin = _begin(config, size)
    names, dialogue = split_dialogue(symbols)
    chars, specials = names[: -len(SPECIALS)], names[-len(SPECIALS) :]
    with contextlib.suppress(ValueError):  # such as words, or characters in another order
        tokenizer: CharTokenizer | FixedCharTokenizer
        if specials == SPECIALS and all(len(char) == 1 for char in chars):
            tokenizer = CharTokenizer("".join(chars), dialogue)
        else:
            tokenizer = FixedCharTokenizer(names, begin, dialogue)
        exported = tokenizer_json(tokenizer)
        if all(content.get(part) == exported[part] for part in ("model", "normalizer")):
            return tokenizer
    return None


def split_dialogue(names: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Return the names of all ids before the tokens of dialogue, and whether these are there."""
    n = len(names) - len(DIALOGUE_TOKENS)
    dialogue = tuple(names[n:]) == DIALOGUE_TOKENS
    return tuple(names[:n] if dialogue else names), dialogue


def _begin(config: Path, size: int) -> int:
    begin = read_json(config).get(BEGIN, NO_TOKEN) if is_file(config) else NO_TOKEN
    if type(begin) is not int or not NO_TOKEN <= begin < size:
        raise ExchangeError(
            f"{config} has {BEGIN}={reprlib.repr(begin)}; it is an id from 0 to {size - 1}"
        )
    return begin


def table_of_text(path: Path, size: int) -> Tokenizer:
    """Return the character table that randyGPT builds from its training text.

    It is `<` and `>` for begin and end, then all characters of the text, sorted.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ExchangeError(f"{path} cannot be read as text: {error}") from error
    return _call_for(path, lambda: _table(["<", ">", *sorted(set(text))], size))


def _call_for(path: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Call `make`; put the name of the file before its error messages."""
    try:
        return make()
    except ValueError as error:
        raise ExchangeError(f"{path}: {str(error).removeprefix('tokenizer: ')}") from error


def _table_of_meta(path: Path, size: int) -> Tokenizer:
    try:
        with open_to_read(path) as file:
            meta = read_pickle(file.read(MAX_PICKLE_BYTES + 1))
    except OSError as error:
        raise ExchangeError(f"{path} cannot be read: {error.strerror}") from error
    itos, stoi = (meta.get(name) if isinstance(meta, dict) else None for name in ("itos", "stoi"))
    if itos is None and isinstance(stoi, dict):
        itos = {token: char for char, token in stoi.items() if isinstance(token, int)}
    if not isinstance(itos, dict) or not itos:
        raise ExchangeError("it has no table of characters (itos)")
    symbols = [""] * size
    for token, char in itos.items():
        if type(token) is not int or not 0 <= token < size or not isinstance(char, str):
            raise ExchangeError(
                f"it gives {reprlib.repr(char)} the id {reprlib.repr(token)}; "
                f"the model's ids are 0 to {size - 1}"
            )
        symbols[token] = char
    return FixedCharTokenizer(tuple(symbols))


def _of_randygpt(content: Mapping[str, Any], size: int) -> Tokenizer:
    """Build the tokenizer of randyGPT's vocab.json: tokens by id, and merges sorted by rank."""
    vocab, merges = content["vocab"], content.get("merges", [])
    if not all(isinstance(token, str) for token in vocab):
        raise ExchangeError("its vocab is not a list of texts")
    if len(vocab) != size:
        raise ExchangeError(
            f"it has {len(vocab)} tokens and the model {size}; give the tokenizer of this model"
        )
    if not merges and all(len(token) == 1 or token in RANDY_SPECIAL for token in vocab):
        return _table(vocab, size)
    ids = {token: i for i, token in enumerate(vocab)}
    ranked = sorted(
        (pair for pair in _pairs(merges) if {*pair, "".join(pair)} <= ids.keys()),
        key=lambda pair: ids["".join(pair)],
    )
    by_line = {
        "type": "Split",
        "pattern": {"String": "\n"},
        "behavior": "Isolated",
        "invert": False,
    }
    return _subword(_bpe(ids, ranked, by_line, {"type": "Fuse"}), size)


def _table(symbols: Sequence[str], size: int) -> Tokenizer:
    """Build randyGPT's character table; of a repeated character the last id counts."""
    if len(symbols) != size:
        raise ExchangeError(
            f"it has {len(symbols)} characters with begin and end, and the model {size}; "
            "give the tokenizer of this model"
        )
    last = {symbol: i for i, symbol in enumerate(symbols)} | dict.fromkeys(RANDY_SPECIAL, -1)
    symbols_used = (symbol if last[symbol] == i else "" for i, symbol in enumerate(symbols))
    return FixedCharTokenizer(tuple(symbols_used), begin=0)


def _byte_level(vocab: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert GPT-2's vocab.json and the merges.txt beside it to a tokenizer.json."""
    ids = {token: i for token, i in vocab.items() if type(i) is int and i >= 0}
    if len(ids) != len(vocab) or len(set(ids.values())) != len(ids):
        raise ExchangeError(f"{path} is neither a tokenizer.json nor a vocabulary of ids")
    merges = path.with_name("merges.txt")
    try:
        if merges.stat().st_size > MAX_JSON_BYTES:
            raise ExchangeError(f"{merges} is too large to be a list of merges")
        lines = read_text(merges).split("\n")
    except OSError as error:
        raise ExchangeError(f"{merges} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExchangeError(f"{merges} is not text in UTF-8") from error
    pairs = [
        line.rstrip("\r").split(" ") for line in lines if line and not line.startswith("#version")
    ]
    content = _bpe(ids, _pairs(pairs), BYTE_LEVEL, BYTE_LEVEL)
    return content | {"added_tokens": _added_tokens(path.parent, ids)}


def _added_tokens(folder: Path, ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the tokens that the files beside GPT-2's vocab.json add to it, by id."""
    files = [folder / name for name in ADDED_FILES]
    added, special, config = (read_json(file) if is_file(file) else {} for file in files)
    special_names = {
        name
        for value in special.values()
        for entry in (value if isinstance(value, list) else [value])
        if isinstance(name := entry.get("content") if isinstance(entry, dict) else entry, str)
    }
    known = {**ids, **added}
    tokens = {name: {"id": known[name]} for name in (*added, *special_names) if name in known}
    decoder = config.get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if not (isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise ExchangeError(f"{files[2]}: the added token {reprlib.repr(token)} has no content")
        number = int(token) if token.isascii() and token.isdigit() and len(token) < 12 else token
        flags = {name: entry[name] for name in FLAGS if type(entry.get(name)) is bool}
        tokens[entry["content"]] = {"id": number, **flags}
        if entry.get("special") is True:
            special_names.add(entry["content"])
    for name, token in tokens.items():
        if type(token["id"]) is not int:
            raise ExchangeError(
                f"{folder}: the added token {reprlib.repr(name)} has the id "
                f"{reprlib.repr(token['id'])}, which is not a whole number"
            )
    return [
        {**dict.fromkeys(FLAGS, False), **token, "content": name, "special": name in special_names}
        for name, token in sorted(tokens.items(), key=lambda item: item[1]["id"])
    ]


def _pairs(merges: Any) -> list[tuple[str, str]]:
    """Return the merges as pairs of strings; raise ExchangeError for anything else."""
    pairs = merges if isinstance(merges, list) else [merges]
    for pair in pairs:
        valid = isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        if not valid:
            raise ExchangeError(f"the merge {reprlib.repr(pair)} is not a pair of tokens")
    return [(left, right) for left, right in pairs]


def _bpe(ids: Mapping[str, int], merges: Any, splits: Any, decoder: Any) -> dict[str, Any]:
    """Return the content of a tokenizer.json with a BPE model."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": splits,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(ids),
            "merges": [list(pair) for pair in merges],
        },
    }


def _subword(content: Mapping[str, Any], size: int) -> Tokenizer:
    """Build a tokenizer.json for `size` ids; ids without a token become "<|unused_N|>"."""
    _check_merges(content)
    tokenizer = SubwordTokenizer.from_file(json.dumps(content))
    n = tokenizer.vocab_size
    if n > size:
        raise ExchangeError(
            f"it has {n} tokens, with one that ends a text, and the model {size}; "
            "give the tokenizer of this model"
        )
    if n == size:
        return tokenizer
    padded_content = json.loads(tokenizer.content)
    padded_content["added_tokens"] += [
        {"id": i, "content": f"<|unused_{i}|>", **PLAIN, "special": True} for i in range(n, size)
    ]
    padded = SubwordTokenizer.from_json({"type": "file", "tokenizer": padded_content})
    if padded.vocab_size != size:
        raise ExchangeError(f"its ids have gaps: it has {n} tokens and the model {size}")
    return padded


def _check_merges(content: Mapping[str, Any]) -> None:
    """Raise ExchangeError for merges of unknown tokens, which crash the library."""
    model = content.get("model")
    vocab, merges = (model.get(n) if isinstance(model, dict) else None for n in ("vocab", "merges"))
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return  # another kind of model, or one that the library refuses
    split = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    for left, right in _pairs(split):
        if not {left, right, left + right} <= vocab.keys():
            raise ExchangeError(
                f"it merges {reprlib.repr((left, right))}, but the result is not a token"
            )
