"""Rows with a conversation: its turns, or which value is invalid and why.

Three forms are read: `messages` with role and content (OpenAI), `conversations` with from and value
(ShareGPT), and `prompt` with `completion`; a `system` beside them is the instruction. Other fields
of a row are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_randygpt.data import DataError
from mlx_randygpt.dialogue import ROLES, Turn
from mlx_randygpt.words import unify_newlines

LISTS = ("messages", "conversations")
PAIR = ("prompt", "completion")
COLUMNS = (*LISTS, *PAIR, "system")  # of a table that are read
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
ROLE_OF = dict(zip(ROLES, ROLES, strict=True)) | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
TOOLS = ("tool_calls", "function_call")
VALID = {
    "messages": '{"messages": [{"role": "user", "content": "…"}, '
    '{"role": "assistant", "content": "…"}]}',
    "conversations": '{"conversations": [{"from": "human", "value": "…"}, '
    '{"from": "gpt", "value": "…"}]}',
    "prompt": '{"prompt": "…", "completion": "…"}',
}
MAX_SHOWN = 40  # characters of a wrong value
JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


class RowError(DataError):
    """An invalid row; --skip-bad-rows leaves it out."""


def has_conversation(row: Mapping[str, Any]) -> bool:
    """Return whether a row, or a table with these columns, holds conversations."""
    return any(name in row for name in (*LISTS, *PAIR))


def conversation(row: Mapping[str, Any], place: str) -> list[Turn]:
    """Return the turns of a row; raise RowError, which begins with `place`, if it is invalid."""
    name = next((name for name in LISTS if row.get(name) is not None), None)
    if name is None and any(key in row for key in PAIR):
        turns = _pair(row, place)
    else:
        name = name or next(name for name in LISTS if name in row)
        turns = _messages(row[name], name, f"{place}: {name}")
    if isinstance(system := row.get("system"), str) and system and turns[0].role != "system":
        turns = [Turn("system", unify_newlines(system)), *turns]
    late = next((i for i, turn in enumerate(turns) if i and turn.role == "system"), None)
    if late is not None:
        raise RowError(f"{place}: message {late + 1} is the system's; only the first can be")
    if all(turn.role != "assistant" for turn in turns):
        raise RowError(f"{place} has no message of the assistant, so there is nothing to learn")
    return turns


def _pair(row: Mapping[str, Any], place: str) -> list[Turn]:
    """Return the turns of `prompt` and `completion`, which are texts or lists of messages."""
    turns = list[Turn]()
    for name, role in zip(PAIR, ("user", "assistant"), strict=True):
        if name not in row:
            raise RowError(f"{place} has no {name!r}; a valid row is {VALID['prompt']}")
        value = row[name]
        if isinstance(value, list):
            turns += _messages(value, name, f"{place}: {name}")
        elif isinstance(value, str):
            turns.append(Turn(role, _checked(value, f"{place}: {name}")))
        else:
            raise RowError(
                f"{place} has {_kind(value)} under {name!r}, not a text; a valid row is "
                f"{VALID['prompt']}"
            )
    return turns


def _messages(values: Any, name: str, place: str) -> list[Turn]:
    valid = f"a valid row is {VALID.get(name, VALID['messages'])}"
    if not isinstance(values, list):
        raise RowError(f"{place} is {_kind(values)}, not a list of messages; {valid}")
    if not values:
        raise RowError(f"{place} is an empty list; {valid}")
    return [_message(value, f"{place}[{i}]", valid) for i, value in enumerate(values)]


def _message(value: Any, place: str, valid: str) -> Turn:
    if not isinstance(value, dict):
        raise RowError(f"{place} is {_kind(value)}, not an object; {valid}")
    if tool := next((name for name in TOOLS if value.get(name)), None):
        raise RowError(f"{place} has {tool}, but only text can be learned; remove the message")
    if value.get("weight") not in (None, 1):
        raise RowError(
            f"{place} has weight={_shown(value['weight'])}, but every answer is learned alike; "
            "remove the message or its weight"
        )
    role, text = (_field(value, keys, place, valid) for keys in (ROLE_KEYS, TEXT_KEYS))
    if not isinstance(role, str) or role not in ROLE_OF:
        known = ", ".join(ROLE_OF)
        raise RowError(f"{place} has the role {_shown(role)}; it must be one of {known}")
    return Turn(ROLE_OF[role], _checked(_text(text, place), place))


def _field(value: Mapping[str, Any], keys: tuple[str, ...], place: str, valid: str) -> Any:
    key = next((key for key in keys if key in value), None)
    if key is None:
        names = ", ".join(map(_shown, list(value)[:5])) or "no fields"
        raise RowError(f"{place} has no {keys[0]!r} but {names}; {valid}")
    return value[key]


def _text(value: Any, place: str) -> str:
    """Return a content, which is a text or a list of parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"{place} has {_kind(value)} as its content; it must be a text")
    parts = list[str]()
    for i, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "a text") or not isinstance(text, str):
            raise RowError(
                f"{place} has a content whose part {i + 1} is {_shown(kind)}, but only text can be "
                'learned; a valid part is {"type": "text", "text": "…"}'
            )
        parts.append(text)
    return "".join(parts)


def _checked(text: str, place: str) -> str:
    if not text.strip():
        raise RowError(f"{place} is empty; give it a text or remove it")
    if "\0" in text:
        raise RowError(f"{place} holds a NUL character, so it is not text; remove it")
    return unify_newlines(text)


def _kind(value: Any) -> str:
    return JSON_TYPES.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # a value of a Parquet file that JSON has no notation for
        text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
