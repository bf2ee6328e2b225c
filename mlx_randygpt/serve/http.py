"""What every request passes: who may ask, how long a body may be, what is counted, what is sent.

Plain ASGI, so that an answer that streams goes out as it is made.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from mlx_randygpt.serve import BODY_SECONDS, MAX_BODY_BYTES, ApiError, Settings
from mlx_randygpt.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/app.js", "/style.css", "/icon.svg", "/health", "/openapi.json")  # GET needs no key
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """JSON in ASCII, so that half a character in a text cannot break it."""
    content = json.dumps(body, allow_nan=False).encode("ascii")
    return Response(content, status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """The error as an object of the OpenAI API."""
    headers = {503: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}
    return json_response(error.body(), error.status, headers.get(error.status))


class Guard:
    """In front of everything: refuses who may not ask, counts, adds the headers of safety."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers[name] = value
            await send(message)

        try:
            if (error := self._refusal(scope)) is not None:
                await error_response(error)(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.add("requests_total", path=path, status=str(status))
            self._metrics.observe("request_seconds", time.perf_counter() - started, path=path)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._settings.loopback_only and _host(headers.get("host", "")) not in LOOPBACK:
            return ApiError(403, "this server answers on localhost only; use --host for others")
        origin = headers.get("origin")
        if origin is not None and origin.split("://")[-1] != headers.get("host"):
            return ApiError(403, "pages of other sites may not ask")
        if scope["path"] in OPEN and scope["method"] in ("GET", "HEAD"):
            return None
        key = self._settings.api_key
        given = headers.get("authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            what = "Incorrect API key provided" if given else "No API key was given"
            message = f"{what}; send the header Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key")
        return None


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header


async def read_body(request: Request) -> bytes:
    """The whole body; ApiError 413 or 408 where it is too long, or too long in coming."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s") from None
    return bytes(body)


async def until_gone(receive: Receive, tell: Callable[[], None]) -> None:
    """Call `tell` when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    tell()


class EventStream(Response):
    """Server-sent events as they are made; `gone` is called where the client leaves early."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], gone: Callable[[], None]) -> None:
        super().__init__(None, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events, self._gone = events, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(until_gone(receive, self._gone))
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._gone()


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, allow_nan=False).encode("ascii") + b"\n\n"
