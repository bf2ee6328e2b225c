"""What all requests share: access checks, limits on bodies, metrics, headers, and event streams.

Plain ASGI, so that streamed responses are sent as they are produced.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
import reprlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mlx_randygpt.serve import BODY_SECONDS, MAX_BODIES_BYTES, MAX_BODY_BYTES, ApiError, Settings
from mlx_randygpt.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/app.js", "/style.css", "/icon.svg", "/health", "/openapi.json")  # GET without a key
PIECE_BYTES = 1 << 16
MAX_ITEMS = 64  # of a list that are written to JSON in one go
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/?#@\[\]\\]+))(?::[0-9]{0,5})?")
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
    """Return a JSON response in ASCII: a lone surrogate in a text cannot be UTF-8."""
    content = json.dumps(body, allow_nan=False).encode("ascii")
    return Response(content, status, headers, "application/json")


def dump(body: object) -> bytes:
    """Return JSON in ASCII like `json_response`, for large bodies.

    It is written in pieces, because json.dumps holds Python's lock until it returns.
    """
    return "".join(_dump(body)).encode("ascii")


def _dump(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for i, (name, x) in enumerate(value.items()):
            yield f"{', ' if i else '{'}{json.dumps(name)}: "
            yield from _dump(x)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > MAX_ITEMS:
        for i in range(0, len(value), MAX_ITEMS):
            yield ", " if i else "["
            yield json.dumps(value[i : i + MAX_ITEMS], allow_nan=False)[1:-1]
        yield "]"
    elif isinstance(value, list) and any(isinstance(x, dict) for x in value):
        for i, x in enumerate(value):
            yield ", " if i else "["
            yield from _dump(x)
        yield "]"
    else:
        yield json.dumps(value, allow_nan=False)


def error_response(error: ApiError) -> Response:
    """Return the error as an error object of the OpenAI API."""
    headers = {503: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}
    return json_response(error.body(), error.status, headers.get(error.status))


class Guard:
    """ASGI middleware: authentication, host and origin checks, metrics, security headers."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check and count a request, and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers[name] = value
            await send(message)

        try:
            if (error := self._refusal(scope)) is not None:
                await error_response(error)(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.add("requests_total", path=path, status=str(status))
            self._metrics.observe("request_seconds", time.perf_counter() - started, path=path)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if (error := self._refuse_host(headers)) is not None:
            return error
        if headers.get("upgrade", "").lower() == "websocket":
            return ApiError(400, "this server has no WebSocket; streams are server-sent events")
        if scope["path"] in OPEN and scope["method"] in ("GET", "HEAD"):
            return None
        key = self._settings.api_key
        credentials = headers.get("authorization", "")
        if key and not hmac.compare_digest(credentials.encode(), f"Bearer {key}".encode()):
            problem = "Incorrect API key provided" if credentials else "No API key was provided"
            message = f"{problem}; send the header Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key")
        return None

    def _refuse_host(self, headers: Headers) -> ApiError | None:
        """Refuse what another site's page could send; only HTTP/1.0 comes without a Host."""
        for header in headers.getlist("host"):
            if (match := HOST.fullmatch(header)) is None:
                message = f"the header Host is {reprlib.repr(header)}; it must be NAME or NAME:PORT"
                return ApiError(400, message)
            names = self._settings.host_names
            name = (match[1] or match[2]).lower().removesuffix(".")
            if names is not None and name not in names and not is_loopback(name):
                message = "this server accepts requests to localhost only; start it with --host"
                return ApiError(403, message)
        for origin in headers.getlist("origin"):
            if origin.split("://")[-1].lower() != headers.get("host", "").lower():
                return ApiError(403, "cross-origin requests are not allowed")
        return None


def is_loopback(name: str) -> bool:
    """Return whether a name is an address that only this machine reaches."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


class Bodies:
    """The bodies that are being read or parsed, and how many bytes they have together."""

    def __init__(self) -> None:
        self._n_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Hold the whole body; raise ApiError if it is too long or too slow, or all are too many.

        Errors have the status 413, 408 and 503.
        """
        body, length, refusal = bytearray(), 0, None
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    length += len(part)
                    if length > MAX_BODY_BYTES:
                        message = f"the body is longer than {MAX_BODY_BYTES} bytes, the limit"
                        raise ApiError(413, message)
                    if refusal is not None:
                        continue  # a client that still sends would not see the response
                    body += part
                    self._n_bytes += len(part)
                    if self._n_bytes > MAX_BODIES_BYTES:
                        message = "too many requests are being read; try again in a second"
                        refusal = ApiError(503, message, code="overloaded")
                        self._n_bytes -= len(body)
                        body.clear()
            if refusal is not None:
                raise refusal
            yield bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
        except ClientDisconnect:
            message = "the client disconnected before the end of the body"
            raise ApiError(400, message) from None
        finally:
            self._n_bytes -= len(body)


async def until_disconnect(receive: Receive, callback: Callable[[], None]) -> None:
    """Call `callback` when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    callback()


class PieceResponse(Response):
    """A body that is sent in pieces, each when the client has read most of those before it.

    `close` is called once it was sent or the client disconnected.
    """

    def __init__(
        self, pieces: AsyncIterator[bytes], close: Callable[[], None], headers: dict[str, str]
    ) -> None:
        super().__init__(None, headers=headers)
        if "content-length" not in headers:
            del self.headers["content-length"]
        self._pieces, self._close = pieces, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces until the last one or until the client disconnects."""
        watch = asyncio.create_task(until_disconnect(receive, self._close))
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._close()


async def cut(content: bytes) -> AsyncIterator[bytes]:
    """Yield a long body in pieces."""
    for at in range(0, len(content), PIECE_BYTES):
        yield content[at : at + PIECE_BYTES]


def event(body: object) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(body, allow_nan=False).encode("ascii") + b"\n\n"
