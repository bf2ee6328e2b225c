"""The server's OpenAPI 3.1 description; requests come from the models that check them."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from mlx_randygpt import __version__
from mlx_randygpt.serve import ServedModel
from mlx_randygpt.serve.models import (
    AttentionBody,
    Body,
    ChatBody,
    CompletionBody,
    CopiesBody,
    PlainBody,
)

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
BODIES = (CompletionBody, ChatBody, PlainBody, AttentionBody, CopiesBody)


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


ANY_REQUEST = (400, 401, 403, 408, 431, 503)  # what the server can refuse before it looks further
NULLABLE: Schema = {"type": ["string", "null"]}
ERROR = _object(error=_object(message=TEXT, type=TEXT, param=NULLABLE, code=NULLABLE))
USAGE = _object(prompt_tokens=INTEGER, completion_tokens=INTEGER)
MODEL = _object(id=TEXT, object={"const": "model"}, created=INTEGER, owned_by=TEXT)


def _operation(
    summary: str, response: Schema, *errors: int, media_type: str = "application/json"
) -> Schema:
    responses: Schema = {
        str(status): {"description": "error", "content": {"application/json": {"schema": ERROR}}}
        for status in (*ANY_REQUEST, *errors)
    }
    responses["200"] = {"description": "done", "content": {media_type: {"schema": response}}}
    return {"summary": summary, "responses": responses}


def _post(summary: str, body: type[Body], response: Schema) -> Schema:
    reference = {"$ref": f"#/components/schemas/{body.__name__}"}
    request = {"required": True, "content": {"application/json": {"schema": reference}}}
    operation = _operation(summary, response, 404, 413, 500)
    return {"post": {**operation, "requestBody": request}}


def _generation(summary: str, body: type[Body], kind: str, **text: Schema) -> Schema:
    choice = _object(index=INTEGER, finish_reason={"enum": ["stop", "length"]}, **text)
    response = _object(
        id=TEXT,
        object={"const": kind},
        created=INTEGER,
        model=TEXT,
        seed=INTEGER,
        usage=USAGE,
        choices=_array(choice),
    )
    operation = _post(summary, body, response)
    operation["post"]["responses"]["200"]["content"]["text/event-stream"] = {"schema": {}}
    return operation


def describe(served: ServedModel, has_key: bool) -> Schema:
    """Return the description of the server's paths; `has_key`: requests need an API key."""
    message = _object(role={"const": "assistant"}, content=TEXT)
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    page = _operation("The page", TEXT, media_type="text/html")
    weights = _array(_array({"type": "number"}))
    health = _operation("Check that the server responds", _object(status={"const": "ok"}))
    metrics = _operation("Metrics for Prometheus", TEXT, media_type="text/plain")
    completion, chat = "text_completion", "chat.completion"
    models = _object(object={"const": "list"}, data=_array(MODEL))
    plain = _object(text=TEXT, model=TEXT, usage=USAGE)
    span = _object(start=INTEGER, stop=INTEGER, text=TEXT)
    copies = _object(
        share={"type": "number"},
        longest=span,
        passages=_array(span),
        text_changed={"type": "boolean"},
    )
    attention = _object(tokens=_array(TEXT), weights=weights)
    paths: dict[str, Schema] = {
        "/": {"get": page, **_post("Continue a prompt", PlainBody, plain)},
        "/v1/completions": _generation("Continue prompts", CompletionBody, completion, text=TEXT),
        "/v1/chat/completions": _generation("Continue a chat", ChatBody, chat, message=message),
        "/v1/models": {"get": _operation("List the model", models)},
        "/v1/models/{name}": {
            "get": {**_operation("Get one model", MODEL, 404), "parameters": [name]}
        },
        "/health": {"get": health},
        "/metrics": {"get": metrics},
        "/run": {"get": _operation("The model, its run, and the server's settings", {})},
        "/attention": _post("Attention weights of one head", AttentionBody, attention),
        "/copies": _post("What a text copies from the training text", CopiesBody, copies),
    }
    schemas = models_json_schema(
        [(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}"
    )[1]["$defs"]
    for schema in schemas.values():
        _allow_null(schema)
    _limit_to_model(schemas, served)
    _limit_fields_together(schemas)
    description: Schema = {
        "openapi": "3.1.0",
        "info": {"title": f"mlxgpt serve: {served.name}", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if has_key:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
        for path in ("/", "/health"):
            paths[path]["get"]["security"] = []
    return description


def _allow_null(schema: Schema) -> None:
    """Describe that null is the same as leaving an optional field out."""
    for name, field in schema.get("properties", {}).items():
        options = field.get("anyOf", [field])
        is_nullable = any(option.get("type") == "null" for option in options)
        if not (is_nullable or name in schema.get("required", [])):
            title = field.pop("title", name)
            schema["properties"][name] = {"anyOf": [*options, {"type": "null"}], "title": title}


def _limit_to_model(schemas: Schema, served: ServedModel) -> None:
    """Describe which tokens, layers and heads the model has."""
    last, model = served.tokenizer.vocab_size - 1, served.model
    for name, n in (("layer", model.n_layer), ("head", model.n_head)):
        schemas["AttentionBody"]["properties"][name]["maximum"] = n - 1
    prompts = schemas["CompletionBody"]["properties"]["prompt"]["anyOf"]
    for items in (prompts[2]["items"], prompts[3]["items"]["items"]):
        items["maximum"] = last
    for name in ("CompletionBody", "ChatBody"):
        biases = schemas[name]["properties"]["logit_bias"]["anyOf"][0]
        biases["propertyNames"] = {"pattern": f"^({_numbers_to(last)})$"}
        biases["additionalProperties"] = {"type": "number", "minimum": -100, "maximum": 100}


def _limit_fields_together(schemas: Schema) -> None:
    """Describe fields that need another one."""
    plain, chat = schemas["CompletionBody"], schemas["ChatBody"]
    same = {"enum": [1, None], "description": "must be the same as n, which can be more than 1"}
    plain["properties"]["best_of"] = same  # two fields cannot be compared
    integer = {"type": "integer"}
    rules = (
        (chat, "top_logprobs", integer, "logprobs", {"const": True}),
        (chat, "stream_options", {"type": "object"}, "stream", {"const": True}),
        (plain, "stream_options", {"type": "object"}, "stream", {"const": True}),
        (plain, "best_of", integer, "n", {"enum": [1, None]}),
    )
    for schema, name, value, needed, needed_value in rules:
        then: Schema = {"properties": {needed: needed_value}}
        if "const" in needed_value:
            then["required"] = [needed]
        given = {"properties": {name: value}, "required": [name]}
        schema.setdefault("allOf", []).append({"if": given, "then": then})


def _numbers_to(last: int) -> str:
    """Return a regular expression of the whole numbers from 0 to `last`."""
    digits = str(last)
    choices = [digits]
    for i, digit in enumerate(digits):
        n_more = len(digits) - i - 1
        if digit > "0":
            choices.append(
                f"{digits[:i]}[0-{int(digit) - 1}]" + f"[0-9]{{{n_more}}}" * (n_more > 0)
            )
    if len(digits) > 1:
        choices.append(f"[0-9]{{1,{len(digits) - 1}}}")
    return "|".join(choices)
