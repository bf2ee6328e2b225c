"""The HTTP server below the application: uvicorn and h11, with limits before a request begins.

A client that stands still, or sends more than a request can have, loses its connection, not the
server its others. Refusals are error objects, like those of the application.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_randygpt.serve import ApiError
from mlx_randygpt.serve.http import SECURITY, App, json_response

MAX_HEADER_BYTES = 1 << 16
MAX_HEADERS = 100
MAX_CHUNKS = 1 << 14  # of a body
MAX_CONNECTIONS = 1024
RESERVED_FILES = 64  # descriptors that are not for connections
N_ACCEPTED = 16  # connections in one turn of the loop
BACKLOG = 1024
GRACE_SECONDS = 3.5  # for running texts when the server stops
STOP_SECONDS = 4.75  # from a signal to the end of the process, whatever is still running
LOG_SECONDS = 60.0  # between two reports that no connection can be accepted
SECONDS = {  # how long a client may keep the server waiting
    "header": 10.0,  # for a whole header
    "idle": 65.0,  # for the next request
    "unread": 30.0,  # for a client that does not read what is sent
    "rest": 5.0,  # for the rest of a body whose response has been sent
    "refused": 2.0,  # for a client to read why
}


class Connection(h11.Connection):
    """The state of one connection; `refusal` is why a request cannot be read."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.refusal: ApiError | None = None
        self._n_chunks = 0

    def next_event(self) -> Any:
        """Return the next event; raise RemoteProtocolError, and set `refusal`, if it is invalid."""
        try:
            if self.their_state is h11.IDLE:
                self._n_chunks = 0
                self._check_header(self.trailing_data[0])
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_request(event)
            elif isinstance(event, h11.Data):
                self._n_chunks += 1
                if self._n_chunks > MAX_CHUNKS:
                    message = f"the body has more than {MAX_CHUNKS} chunks, the limit"
                    raise h11.RemoteProtocolError(message, 413)
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint if error.error_status_hint < 500 else 400
            message = f"invalid HTTP request: {error}" if status == 400 else str(error)
            if status == 431:
                message = f"the header is longer than {MAX_HEADER_BYTES} bytes or has more than"
                message += f" {MAX_HEADERS} lines, the limits"
            self.refusal = ApiError(status, message)
            raise
        return event

    def _check_header(self, received: bytes) -> None:
        """Count before h11 reads every line."""
        end = min((i for end in (b"\n\r\n", b"\n\n") if (i := received.find(end)) >= 0), default=-1)
        header = received[:end] if end >= 0 else received
        if len(header) > MAX_HEADER_BYTES or header.count(b"\n") > MAX_HEADERS:
            raise h11.RemoteProtocolError("header too large", 431)


def _check_request(request: h11.Request) -> None:
    names = {name for name, _ in request.headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("the version must be HTTP/1.0 or HTTP/1.1")


class Protocol(H11Protocol):
    """One connection with uvicorn's protocol; `check` closes it if its client stands still."""

    def __init__(self, max_connections: int, **facts: Any) -> None:
        super().__init__(**facts)
        self.conn: Connection = Connection()
        self._max_connections = max_connections
        self._waits_for, self.since = "header", time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; if there are too many connections, the one that is idle longest gives way."""
        super().connection_made(transport)
        if len(self.connections) <= self._max_connections:
            return
        others: list[Protocol] = [c for c in self.connections if isinstance(c, Protocol)]
        idle = [c for c in others if c is not self and c.waits_for() in ("header", "idle")]
        if idle:
            min(idle, key=lambda connection: connection.since).abort()
        else:
            self._refuse(ApiError(503, "too many connections; try again in a second"))

    def data_received(self, data: bytes) -> None:
        """Read on, unless the connection was refused: then only discard, so that it can say why."""
        if self.conn.refusal is None:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Say why a request cannot be read."""
        self._refuse(self.conn.refusal or ApiError(400, msg))

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.since = time.monotonic()
        super().on_response_complete()

    def abort(self) -> None:
        """Close the connection without waiting for its client."""
        self.connections.discard(self)
        self.transport.abort()

    def waits_for(self) -> str:
        """Return what the server waits for; "": nothing, or what the application limits."""
        if self.transport.is_closing() or self.flow.write_paused:
            return "unread"
        if self.conn.refusal is not None:
            return "refused"
        responded = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is h11.IDLE:
            has_begun = self.cycle is None or bool(self.conn.trailing_data[0])
            return "header" if has_begun else "idle"
        return "rest" if responded else ""

    def check(self, now: float) -> None:
        """Close the connection if its client has kept the server waiting for too long."""
        reason = self.waits_for()
        if reason != self._waits_for:
            self._waits_for, self.since = reason, now
        if not reason or now - self.since <= SECONDS[reason]:
            return
        if reason == "header":
            seconds = SECONDS["header"]
            self._refuse(ApiError(408, f"the header did not arrive within {seconds:g} s"))
        else:
            self.abort()

    def _refuse(self, error: ApiError) -> None:
        """Send an error if no response has begun, and read nothing more."""
        self.conn.refusal = error
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.abort()
            return
        self.flow.resume_reading()
        retry = {"retry-after": "1"} if error.status == 503 else {}
        headers = {**SECURITY, "connection": "close", **retry}
        response = json_response(error.body(), error.status, headers)
        head = h11.Response(status_code=error.status, headers=response.raw_headers)
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()


class Server(uvicorn.Server):
    """Serve an application on a listening socket until a signal; `stop` ends its texts.

    `exit_at_once` is called with the signal if the process has not ended STOP_SECONDS after it.
    """

    def __init__(
        self,
        app: App,
        listening: socket.socket,
        stop: Callable[[], None],
        max_connections: int,
        exit_at_once: Callable[[int], None],
    ) -> None:
        def protocol(**facts: Any) -> Protocol:
            return Protocol(max_connections, **facts)

        config = uvicorn.Config(
            app,
            http=protocol,  # type: ignore[arg-type]
            ws="none",
            log_level="error",
            access_log=False,
            backlog=N_ACCEPTED,
            timeout_keep_alive=int(SECONDS["idle"]),
            server_header=False,
            proxy_headers=False,
            lifespan="on",
        )
        super().__init__(config)
        self._listening, self._stop, self._exit = listening, stop, exit_at_once
        self._reported = -LOG_SECONDS

    def serve_until_signal(self) -> None:
        """Serve, and return after a signal within five seconds."""
        self.run(sockets=[self._listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections, few in each turn of the loop."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self._report)
        await super().startup(sockets)
        self._listening.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        """Look at all connections once a second."""
        if counter % 10 == 0:
            self.check_connections(time.monotonic())
        return await super().on_tick(counter)

    def check_connections(self, now: float) -> None:
        """Close the connections whose clients stand still."""
        for connection in self._connections():
            connection.check(now)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a thread that cannot be stopped does not keep the process alive."""
        timer = threading.Timer(STOP_SECONDS, self._exit, (sig,))
        timer.daemon = True
        timer.start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let responses end for a while, then end texts and connections."""
        self.loop.call_later(GRACE_SECONDS, self._stop)
        self.loop.call_later(GRACE_SECONDS + 0.5, self._abort)
        self._close_without_request()
        await super().shutdown(sockets)
        if tasks := set(self.server_state.tasks):  # after a second signal
            self._stop()
            await asyncio.sleep(0.1)
            self._abort()
            await asyncio.wait(tasks, timeout=0.5)

    def _close_without_request(self) -> None:
        for connection in self._connections():
            if connection.waits_for() in ("header", "idle", "refused", "rest"):
                connection.abort()

    def _abort(self) -> None:
        for connection in self._connections():
            connection.abort()

    def _connections(self) -> list[Protocol]:
        return [c for c in self.server_state.connections if isinstance(c, Protocol)]

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log that no connection can be accepted once a minute, not for each."""
        if "socket.accept() out of system resource" not in str(context.get("message")):
            loop.default_exception_handler(context)
        elif (now := time.monotonic()) - self._reported >= LOG_SECONDS:
            self._reported = now
            reason = context.get("exception")
            logging.getLogger("uvicorn.error").error("cannot accept connections: %s", reason)


def connection_limit() -> int:
    """Return how many connections the limit on open files leaves room for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(files - RESERVED_FILES, files // 4))
