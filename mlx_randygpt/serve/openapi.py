"""The server's OpenAPI description, made from the tables that requests are checked against."""

from __future__ import annotations

from typing import Any

from mlx_randygpt import __version__
from mlx_randygpt.serve import ServedModel, schema

Body = dict[str, Any]
ERROR: Body = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
USAGE: Body = {
    "type": "object",
    "properties": {
        name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    },
    "required": ["prompt_tokens", "completion_tokens"],
}
MODEL: Body = {
    "type": "object",
    "properties": {
        "id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"},
        "owned_by": {"type": "string"}, "context_length": {"type": "integer"},
    },
    "required": ["id", "object", "created", "owned_by"],
}  # fmt: skip


def _texts(kind: str, text: Body) -> Body:
    """An answer with choices."""
    choice = {"index": {"type": "integer"}, "finish_reason": {"enum": ["stop", "length"]}, **text}
    return _object(
        id={"type": "string"}, object={"const": kind}, created={"type": "integer"},
        model={"type": "string"}, seed={"type": "integer"}, usage=USAGE,
        choices={"type": "array", "items": _object(**choice)},
    )  # fmt: skip


def _object(**properties: Body) -> Body:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _answers(body: Body, *errors: int, kind: str = "application/json") -> Body:
    """200 and what may go wrong."""
    answers = {"200": {"description": "done", "content": {kind: {"schema": body}}}}
    for status in (401, 403, *errors):
        content = {"application/json": {"schema": ERROR}}
        answers[str(status)] = {"description": "an error", "content": content}
    return answers


def _post(summary: str, request: Body, answer: Body, *errors: int, streams: bool = False) -> Body:
    answers = _answers(answer, 400, 404, 408, 413, 500, 503, *errors)
    if streams:
        answers["200"]["content"]["text/event-stream"] = {"schema": {}}  # data: JSON, [DONE] last
    content = {"application/json": {"schema": request}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": content},
        "responses": answers,
    }


def _get(summary: str, answer: Body, *errors: int, kind: str = "application/json") -> Body:
    return {"summary": summary, "responses": _answers(answer, *errors, kind=kind)}


def description(served: ServedModel, has_key: bool) -> Body:
    """OpenAPI 3.1."""
    text: Body = {"type": "string"}
    message = _object(role={"const": "assistant"}, content=text)
    seed_answer = _object(text=text, model=text, usage=USAGE)
    shares = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    attended = _object(tokens={"type": "array", "items": text}, weights=shares)
    models = _object(object={"const": "list"}, data={"type": "array", "items": MODEL})
    one = {
        **_get("One model", MODEL, 404),
        "parameters": [{"name": "name", "in": "path", "required": True, "schema": text}],
    }
    paths: dict[str, Body] = {
        "/": {
            "get": _get("The page", text, kind="text/html"),
            "post": _post("A text, as the seeds ask for it", schema.SEED, seed_answer),
        },
        "/v1/completions": {
            "post": _post(
                "Texts that continue prompts", schema.COMPLETION,
                _texts("text_completion", {"text": text}), streams=True,
            )
        },
        "/v1/chat/completions": {
            "post": _post(
                "The next message of a plain transcript", schema.CHAT,
                _texts("chat.completion", {"message": message}), streams=True,
            )
        },
        "/v1/models": {"get": _get("The model", models)},
        "/v1/models/{name}": {"get": one},
        "/health": {"get": _get("Whether it answers", _object(status={"const": "ok"}, model=text))},
        "/metrics": {"get": _get("Counts for Prometheus", text, kind="text/plain")},
        "/run": {"get": _get("The model's run and the server's settings", {"type": "object"})},
        "/attention": {"post": _post("What one head attends to", schema.ATTENTION, attended)},
    }  # fmt: skip
    found: Body = {
        "openapi": "3.1.0",
        "info": {"title": f"mlxgpt serve: {served.name}", "version": __version__},
        "paths": paths,
    }
    if has_key:
        found["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        found["security"] = [{"key": []}]
        for path in ("/", "/health"):
            paths[path]["get"]["security"] = []
    return found
