"""The shape of each request as JSON Schema, and the check that a body has it.

The same tables are the server's OpenAPI description, so the two cannot differ. Only the keywords
that are used here are understood.
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

from mlx_randygpt.serve import MAX_CHOICES, MAX_LOGPROBS, MAX_TOKENS, ApiError

Schema = dict[str, Any]
WRONG_TYPE = "invalid_type"
MAX_INTEGER = 2**53 - 1  # integers beyond are not the same in every JSON reader


def number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def integer(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def array(items: Schema, most: int, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


FLAG: Schema = {"type": ["boolean", "null"]}
TEXT: Schema = {"type": ["string", "null"]}
TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}
TOKENS = array(TOKEN, 1 << 20)
STOP: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": 1000},
        array({"type": "string", "minLength": 1, "maxLength": 1000}, 16, least=0),
        {"type": "null"},
    ]
}
BIAS: Schema = {
    "type": ["object", "null"],
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": 1024,
}
UNUSED: dict[str, Schema] = {  # of the OpenAI API, without a meaning here
    "user": TEXT, "store": FLAG, "metadata": {"type": ["object", "null"]}, "service_tier": TEXT,
    "safety_identifier": TEXT, "prompt_cache_key": TEXT,
}  # fmt: skip
SAMPLING: dict[str, Schema] = {
    "model": TEXT,
    "max_tokens": integer(0, MAX_TOKENS),
    "temperature": number(0, 1000),
    "top_p": number(0, 1),
    "top_k": integer(0, MAX_INTEGER),
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "repetition_penalty": number(0.001, 1000),
    "presence_penalty": number(-100, 100),
    "frequency_penalty": number(-100, 100),
    "logit_bias": BIAS,
    "stop": STOP,
    "seed": integer(0, MAX_INTEGER),
    "n": integer(1, MAX_CHOICES),
    "stream": FLAG,
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": FLAG, "include_obfuscation": FLAG},
        "additionalProperties": False,
    },
    **UNUSED,
}
COMPLETION: Schema = {
    "type": "object",
    "properties": {
        "prompt": {
            "anyOf": [
                {"type": "string"}, array({"type": "string"}, MAX_CHOICES), TOKENS,
                array(TOKENS, MAX_CHOICES),
            ]
        },
        **SAMPLING,
        "echo": FLAG,
        "logprobs": integer(0, MAX_LOGPROBS),
        "best_of": integer(1, MAX_CHOICES),
        "suffix": {"type": "null"},
        "truncate_prompt": FLAG,
    },
    "required": ["prompt"],
    "additionalProperties": False,
}  # fmt: skip
MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {
            "anyOf": [
                {"type": "string"},
                array(
                    {
                        "type": "object",
                        "properties": {
                            "type": {"type": "string", "enum": ["text"]},
                            "text": {"type": "string"},
                        },
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                    256,
                ),
            ]
        },
        "name": TEXT,
        "refusal": {"type": "null"},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
CHAT: Schema = {
    "type": "object",
    "properties": {
        "messages": array(MESSAGE, 1024),
        **SAMPLING,
        "max_completion_tokens": integer(0, MAX_TOKENS),
        "logprobs": FLAG,
        "top_logprobs": integer(0, MAX_LOGPROBS),
        "response_format": {
            "type": ["object", "null"],
            "properties": {"type": {"type": "string", "enum": ["text"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
    },
    "required": ["messages"],
    "additionalProperties": False,
}
SEED: Schema = {
    "type": "object",
    "properties": {
        "prompt": {"type": "string"},
        "max_tokens": {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS, "default": 2048},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1000, "default": 0.7},
        "seed": integer(0, MAX_INTEGER),
    },
    "required": ["prompt"],
    "additionalProperties": False,
}
ATTENTION: Schema = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "layer": {"type": "integer", "minimum": 0, "maximum": 999},
        "head": {"type": "integer", "minimum": 0, "maximum": 4095},
    },
    "required": ["text", "layer", "head"],
    "additionalProperties": False,
}

TYPES: dict[str, Any] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: (
        (isinstance(v, int) and not isinstance(v, bool))
        or (isinstance(v, float) and v.is_integer())
    ),
}


def parse(body: bytes, schema: Schema) -> dict[str, Any]:
    """The JSON object in a body, checked; ApiError 400 says what is wrong and where."""
    try:
        value = json.loads(body, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ApiError(400, f"the body is not JSON: {reason}") from error
    check(value, schema, "")
    return dict(value)


def check(value: Any, schema: Schema, path: str) -> None:
    """ApiError unless the value has this shape; `path` names it."""
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], path)
        return
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(TYPES[kind](value) for kind in kinds):
        shown = reprlib.repr(value)
        message = f"{_named(path)} is {shown}; it must be of type {' or '.join(kinds)}"
        raise ApiError(400, message, param=path or None, code=WRONG_TYPE)
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(value, schema, path)
    elif isinstance(value, str):
        _check_text(value, schema, path)
    elif isinstance(value, list):
        _check_size(len(value), schema, path, "minItems", "maxItems", "items")
        for index, item in enumerate(value):
            check(item, schema["items"], f"{path}[{index}]")
    elif isinstance(value, dict):
        _check_object(value, schema, path)


def _check_any(value: Any, choices: list[Schema], path: str) -> None:
    """Any of them; where none fits, the complaint of the one that comes closest."""
    errors: list[ApiError] = []
    for choice in choices:
        try:
            return check(value, choice, path)
        except ApiError as error:
            errors.append(error)
    raise max(errors, key=lambda error: (len(error.param or ""), error.code != WRONG_TYPE))


def _check_number(value: float, schema: Schema, path: str) -> None:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if not low <= value <= high:
        shown = reprlib.repr(value)
        raise _wrong(path, f"{_named(path)} is {shown}; it must be from {low} to {high}")


def _check_text(value: str, schema: Schema, path: str) -> None:
    _check_size(len(value), schema, path, "minLength", "maxLength", "characters")
    if value not in schema.get("enum", [value]):
        known = ", ".join(schema["enum"])
        raise _wrong(path, f"{_named(path)} is {reprlib.repr(value)}; it is one of {known}")


def _check_size(n: int, schema: Schema, path: str, least: str, most: str, what: str) -> None:
    if not schema.get(least, 0) <= n <= schema.get(most, n):
        low, high = schema.get(least, 0), schema.get(most, "any number")
        raise _wrong(path, f"{_named(path)} has {n} {what}; it must have {low} to {high}")


def _check_object(value: dict[str, Any], schema: Schema, path: str) -> None:
    properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            raise _wrong(_inside(path, name), f"{_named(_inside(path, name))} is missing")
    _check_size(len(value), schema, path, "minProperties", "maxProperties", "entries")
    for name, item in value.items():
        inside = _inside(path, name if name in properties else reprlib.repr(name)[:40])
        if name in properties:
            check(item, properties[name], inside)
        elif more is False:
            raise _wrong(inside, f"{inside} is not known here")
        elif isinstance(more, dict):
            check(item, more, inside)


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _named(path: str) -> str:
    return path or "the body"


def _wrong(path: str, message: str) -> ApiError:
    return ApiError(400, message, param=path or None)


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
