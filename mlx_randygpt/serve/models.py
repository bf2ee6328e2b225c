"""The bodies of requests as pydantic models, and the wording of their errors.

The OpenAPI description is generated from the same models. Numbers and flags are strict ("3" is
not 3), except that 3.0 is an integer: JSON has one type for both.
"""

from __future__ import annotations

import json
import reprlib
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    StrictBool,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from mlx_randygpt.serve import MAX_CHOICES, MAX_LOGPROBS, MAX_TOKENS, ApiError

MAX_ENTRIES = 1024  # of an object
MAX_STOP = 1000  # characters
MAX_INTEGER = 2**53 - 1  # larger integers differ between JSON parsers
WRONG_TYPE = "invalid_type"
TYPES = {  # pydantic's type errors -> JSON's name of the type that would be right
    "string_type": "string",
    "int_type": "integer",
    "float_type": "number",
    "bool_type": "boolean",
    "list_type": "array",
    "dict_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
    "none_required": "null",
}


def _to_int(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_size(value: object) -> object:
    """Refuse a large object before its entries are checked."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_long", "too long", {"max_length": MAX_ENTRIES})
    return value


def _check_string(value: object) -> object:
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "not a string")
    return value


# pydantic's own str refuses half of a surrogate pair, which JSON allows
Text = Annotated[str, PlainValidator(_check_string), WithJsonSchema({"type": "string"})]
WHOLE = BeforeValidator(_to_int)
Number = Annotated[float, Strict()]
Token = Annotated[  # 3.0 comes second, for a function in Python is slow in a list of a million
    Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
    | Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER), WHOLE],
    Field(union_mode="left_to_right"),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}),
]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
MaxTokens = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKENS), WHOLE]
Seed = Annotated[int, Field(strict=True, ge=-1, le=MAX_INTEGER), WHOLE]  # -1: draw one
Share = Annotated[Number, Field(ge=0, le=1)]
Penalty = Annotated[Number, Field(ge=-100, le=100)]
StopText = Annotated[
    Text,
    Field(min_length=1, max_length=MAX_STOP),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_STOP}),
]
StopTexts = Annotated[list[StopText], Field(max_length=16, fail_fast=True)]


class Body(BaseModel):
    """An object; null is the same as leaving a field out.

    Unknown fields that would change the text are refused, others are ignored.
    """

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), json_schema_extra={"additionalProperties": True}
    )
    _nullable: ClassVar[tuple[str, ...]] = ()  # fields in which null is a value

    @model_validator(mode="before")
    @classmethod
    def _keep_fields_with_effect(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        _check_size(value)
        fields = cls.model_fields
        nullable = {*cls._nullable, *(n for n, field in fields.items() if field.default is None)}
        return {
            name: x
            for name, x in value.items()
            if (name in nullable if x is None else name in fields) or changes_text(name, x)
        }

    @classmethod
    def ignored(cls, value: dict[str, Any]) -> list[str]:
        """Return the names of the fields of a valid object that have no meaning here."""
        return [name for name, x in value.items() if x is not None and name not in cls.model_fields]


class StreamOptions(Body):
    """`stream_options` of the OpenAI API."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class SamplingBody(Body):
    """The fields that completions and chat share. Null and absent mean the server's setting."""

    model: Text | None = None
    max_tokens: MaxTokens | None = None
    temperature: Annotated[Number, Field(ge=0, le=1000)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER), WHOLE] | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.001, le=1000)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Text, Penalty],
            BeforeValidator(_check_size),
            WithJsonSchema({"type": "object", "maxProperties": MAX_ENTRIES}),
        ]
        | None
    ) = None
    stop: StopText | StopTexts | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), WHOLE] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    # fields of the OpenAI API that have no effect here
    user: Text | None = None
    store: StrictBool | None = None
    metadata: dict[Text, Any] | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    prompt: Text | Texts | Tokens | TokenLists
    echo: StrictBool | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), WHOLE] | None = None
    suffix: None = None
    truncate_prompt: StrictBool | None = None


class TextPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a chat."""

    _nullable = ("content",)

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Text
        | Annotated[list[TextPart], Field(min_length=1, max_length=256, fail_fast=True)]
        | None  # empty
    )
    name: Text | None = None
    refusal: None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]


class ResponseFormat(Body):
    """`response_format` of the OpenAI API; only text is supported."""

    type: Literal["text"]


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: MaxTokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    response_format: ResponseFormat | None = None


class PlainBody(Body):
    """`POST /`, the API of the ancestor projects."""

    prompt: Text
    max_tokens: MaxTokens = 2048
    temperature: Annotated[Number, Field(ge=0, le=1000)] = 0.7
    seed: Seed | None = None


class AttentionBody(Body):
    """`POST /attention`: a text, or the messages of a dialogue."""

    text: Text | None = None
    messages: Messages | None = None
    layer: Annotated[int, Field(strict=True, ge=0, le=999), WHOLE]
    head: Annotated[int, Field(strict=True, ge=0, le=4095), WHOLE]


class CopiesBody(Body):
    """`POST /copies`."""

    text: Text


B = TypeVar("B", bound=Body)

# Names of other servers' settings; those of this server's are added below.
OTHER_SETTINGS = set(
    """audio bad_words chat_template chat_template_kwargs continue_final_message do_sample
    early_stopping function_call functions grammar ignore_eos json_schema length_penalty
    logits_processors max_length max_new_tokens min_length min_tokens modalities n_predict
    no_repeat_ngram_size num_beams num_predict options prediction reasoning reasoning_effort
    repeat_last_n repeat_penalty response_format samplers stop_token_ids structured_outputs system
    template tfs_z tool_calls tool_choice tools top_a top_n_sigma use_beam_search verbosity
    web_search_options""".split()  # noqa: SIM905
)
OTHER_PREFIXES = ("guided_", "mirostat", "dry_", "xtc_", "dynatemp_")
WITHOUT_EFFECT = {"model", "user", "store", "metadata", "service_tier", "safety_identifier",
                  "prompt_cache_key", "refusal"}  # fmt: skip
SETTINGS = OTHER_SETTINGS | (
    {*CompletionBody.model_fields, *ChatBody.model_fields} - WITHOUT_EFFECT
)
NEUTRAL: tuple[Any, ...] = (
    False,
    0,
    "",
    [],
    {},
    "none",
    "auto",
    "default",
    "text",
    ["text"],
    {"type": "text"},
)


def _shorten(name: str) -> set[str]:
    """Return a name in lower-case letters, and every variant of it with one letter left out."""
    letters = "".join(c for c in name[:40].lower() if c.isalnum())
    return {letters, *(letters[:i] + letters[i + 1 :] for i in range(len(letters)))}


SIMILAR = frozenset().union(*(_shorten(name) for name in SETTINGS if len(name) > 4))


def changes_text(name: str, value: object) -> bool:
    """Return whether a field is, or is close to, a setting, and its value is not a usual default.

    A misspelled setting would otherwise be left out without notice.
    """
    if value is None or any(value is x or (value == x) for x in NEUTRAL):
        return False
    if name in SETTINGS or name.startswith(OTHER_PREFIXES):
        return True
    return len(name) <= 40 and any(len(variant) > 3 for variant in SIMILAR & _shorten(name))


def parse(content: bytes, model: type[B]) -> tuple[B, list[str]]:
    """Return a request's body as its model, and the names of the fields that were ignored.

    Raises ApiError 400, which names field and value.
    """
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ApiError(400, f"the body is not valid JSON: {reason}") from error
    try:
        return model.model_validate(value), model.ignored(value)
    except ValidationError as error:
        raise _api_error(error.errors(include_url=False), value, model) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _api_error(errors: list[ErrorDetails], body: Any, model: type[Body]) -> ApiError:
    """Return the error of the first wrong field.

    Of a union's errors, one about a value is best: its types were right. Otherwise the one that
    is farthest into the field.
    """
    errors = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    paths = [_path(error, body) for error in errors]

    def rank(i: int) -> tuple[bool, int, list[int]]:
        indices = [part for part in paths[i] if isinstance(part, int)]
        return errors[i]["type"] not in TYPES, len(paths[i]), indices

    best = max(range(len(errors)), key=rank)
    error, path = errors[best], paths[best]
    at = _spell(path)
    if error["type"] == "extra_forbidden":
        message = f"Unknown parameter: {reprlib.repr(at)}; it would change the text"
        return ApiError(400, message, param=at, code="unknown_parameter")
    if error["type"] not in TYPES:
        return ApiError(400, f"{at or 'the body'} {_complaint(error)}", param=at or None)
    types = [TYPES[error["type"]]]
    if len(path) == min(map(len, paths)):  # the place of the union itself
        types = [TYPES[e["type"]] for e in errors if e["type"] in TYPES]
    field = model.model_fields.get(str(path[0])) if len(path) == 1 else None
    if field is not None and not field.is_required() and field.default is None:
        types.append("null")
    shown, expected = reprlib.repr(error["input"]), " or ".join(dict.fromkeys(types))
    message = f"{at or 'the body'} is {shown}; it must be of type {expected}"
    return ApiError(400, message, param=at or None, code=WRONG_TYPE)


def _complaint(error: ErrorDetails) -> str:
    kind, value, limits = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        units: dict[type, str] = {str: "characters", dict: "entries", list: "items"}
        unit = units[type(value)]
        limit = limits.get("min_length", limits.get("max_length"))
        side = "least" if "short" in kind else "most"
        return f"has {len(value)} {unit}; it must have at {side} {limit}"
    shown = reprlib.repr(value)
    if kind == "greater_than_equal":
        return f"is {shown}; it must be at least {limits['ge']:g}"
    if kind == "less_than_equal":
        return f"is {shown}; it must be at most {limits['le']:.17g}"
    if kind == "literal_error":
        return f"is {shown}; it must be {limits['expected']}"
    return f"is {shown}: {error['msg']}"


def _path(error: ErrorDetails, value: Any) -> list[int | str]:
    """Return the keys and indices of an error's location, without the names of union members."""
    path: list[int | str] = []
    for part in error["loc"]:
        is_index = isinstance(value, list) and isinstance(part, int)
        if is_index or (isinstance(value, dict) and part in value):
            value = value[part]
            path.append(part)
    if error["type"] == "missing" and path[-1:] != list(error["loc"][-1:]):
        path += error["loc"][-1:]
    return path


def _spell(path: list[int | str]) -> str:
    """Spell a path as `messages[1].content`."""
    spelled = ""
    for part in path:
        name = str(part) if len(str(part)) <= 40 else f"{str(part)[:40]}…"
        spelled += f"[{part}]" if isinstance(part, int) else f".{name}" if spelled else name
    return spelled
