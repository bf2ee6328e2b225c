"""What the server refuses before a request begins, and how it ends, over raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("pydantic")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from served import Host

from mlx_randygpt.serve import N_THREADS, ApiError, api, http, submission
from mlx_randygpt.serve import server as limits
from mlx_randygpt.serve.api import SMALL_BYTES
from mlx_randygpt.serve.responses import MAX_ENTRIES, ResponseBuilder
from mlx_randygpt.serve.submission import InFlight

END = b"\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost" + END
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked" + END


@pytest.fixture
def host(make_run: Callable[..., Any]) -> Iterator[Host]:
    run, backend = make_run("modern")
    host = Host(run, backend, n_connections=3)
    host.start()
    yield host
    host.stop()


def connect(host: Host) -> socket.socket:
    return socket.create_connection(("127.0.0.1", host.port), timeout=30)


def post(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read(connection: socket.socket) -> tuple[int, bytes]:
    """Return status and body once the server has closed the connection."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    head, _, body = received.partition(END)
    return int(head.split()[1]), body


def ask(host: Host, request: bytes) -> tuple[int, bytes]:
    with closing(connect(host)) as connection:
        connection.sendall(request)
        return read(connection)


def later(host: Host, seconds: float) -> None:
    """Let the server look at its connections as if so much time had passed; and wait for it."""
    done = asyncio.run_coroutine_threadsafe(check(host, seconds), host.server.loop)
    done.result(30)


async def check(host: Host, seconds: float) -> None:
    now = time.monotonic()
    host.server.check_connections(now)
    host.server.check_connections(now + seconds)


def closed(request: bytes) -> bytes:
    return request.replace(END, b"\r\nConnection: close" + END, 1)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + END, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 300_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\n" * 10_000, 431),
        (HEALTH * 2 + b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 200),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com" + END, 400),
        (b"GET /health HTTP/1.0\r\nHost: localhost\r\nHost: evil.com" + END, 400),
        (b"GET /health HTTP/1.1" + END, 400),
        (b"GET /health HTTP/2.0\r\nHost: localhost" + END, 400),
        (b"\r\n\r\nGET / HTTP/1.1\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00" + END, 400),
        (b"GET /health HTTP/1.0" + END, 200),
        (CHUNKED + b"1\r\na\r\n" * 20_000, 413),
        (CHUNKED + b"nonsense\r\n", 400),
        (CHUNKED.replace(b"\r\nT", b"\r\nContent-Length: 5\r\nT") + b"0" + END, 400),
        (CHUNKED.replace(b"chunked", b"gzip"), 400),
    ],
)  # fmt: skip
def test_requests_beyond_the_limits_are_refused(
    request_bytes: bytes, status: int, host: Host
) -> None:
    received, body = ask(host, request_bytes)
    assert received == status
    if status != 200:
        assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8080", 200), ("127.0.0.1", 200), ("127.1.2.3:80", 200),
        ("[::1]:8080", 200), ("[::ffff:127.0.0.1]", 200), ("localhost.", 200),
        ("evil.com", 403), ("[::1].evil.com", 400), ("localhost.evil.com", 403), ("", 400),
        ("127.0.0.1.evil.com", 403), ("127.0.0.1:80:evil.com", 400), ("a@localhost", 400),
        ("[::2]", 403), ("192.168.0.1", 403), ("localhost/evil", 400), ("localhost:999999", 400),
    ],
)  # fmt: skip
def test_the_host_must_be_this_machine(name: str, status: int, host: Host) -> None:
    request = HEALTH.replace(b"localhost", name.encode())
    assert ask(host, closed(request))[0] == status


def test_a_page_of_another_site_is_refused(host: Host) -> None:
    for origin, status in ((b"http://localhost", 200), (b"http://evil.com", 403), (b"null", 403)):
        request = HEALTH.replace(END, b"\r\nOrigin: " + origin + END)
        assert ask(host, closed(request))[0] == status


def test_a_websocket_is_refused_without_a_line_of_log(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    upgrade = b"\r\nUpgrade: websocket\r\nConnection: Upgrade, close" + END
    status, body = ask(host, HEALTH.replace(END, upgrade))
    assert (status, b"WebSocket" in body) == (400, True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nHo"])
def test_a_header_that_does_not_arrive_ends_the_connection(sent: bytes, host: Host) -> None:
    with closing(connect(host)) as connection:
        connection.sendall(sent)
        assert ask(host, closed(HEALTH))[0] == 200  # the server knows of both by now
        later(host, limits.SECONDS["header"] + 1)
        status, body = read(connection)
    assert (status, b"did not arrive" in body) == (408, True)


def test_a_connection_that_waits_gives_way_to_a_new_one(host: Host) -> None:
    silent = [connect(host) for _ in range(20)]
    assert ask(host, closed(HEALTH))[0] == 200
    for connection in silent:
        connection.close()


def test_a_body_that_nobody_reads_does_not_keep_a_connection(host: Host) -> None:
    with closing(connect(host)) as connection:
        connection.sendall(CHUNKED.replace(b"/v1/completions", b"/nowhere"))
        assert b"404" in connection.recv(1 << 16)
        later(host, limits.SECONDS["rest"] + 1)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1 << 16):
                pass


def test_a_client_that_does_not_read_loses_its_connection(host: Host) -> None:
    body = {"prompt": "a", "max_tokens": 3000, "n": 8, "logprobs": 20, "stream": True}
    body["logit_bias"] = {str(host.run.tokenizer.eos): -100}
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", host.port))
        connection.sendall(post(body))
        connection.recv(1, socket.MSG_PEEK)  # the answer has begun
        later(host, limits.SECONDS["unread"] - 1)
        assert host.server.server_state.tasks
        while host.server.server_state.tasks:
            later(host, limits.SECONDS["unread"] + 1)
    assert ask(host, post({"prompt": "a", "max_tokens": 1}))[0] == 200


def test_when_the_server_stops_answers_end_with_an_error(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "GRACE_SECONDS", 0.0)
    eos = str(host.run.tokenizer.eos)
    body = {"prompt": "a", "max_tokens": 32768, "n": 4, "logit_bias": {eos: -100}}
    with (
        closing(connect(host)) as whole,
        closing(connect(host)) as stream,
        closing(connect(host)) as slow,
    ):
        slow.sendall(CHUNKED)
        whole.sendall(post(body))
        stream.sendall(post({**body, "stream": True}))
        assert stream.recv(1)
        while host.metrics.value("streams") != 8:
            later(host, 0)
        host.stop()
        status, answer = read(whole)
        rest = stream.makefile("rb").read()
    assert (status, json.loads(answer)["error"]["code"]) == (503, "stopping")
    last = rest.partition(b"data: ")[2].split(b"data: ")[-1]
    assert b'"code": "stopping"' in last
    assert rest.endswith(b"0\r\n\r\n")  # a complete response
    assert capfd.readouterr() == ("", "")


def test_failures_to_accept_are_one_line_of_log(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "x")}
    assert ask(host, closed(HEALTH))[0] == 200  # it runs
    for _ in range(1000):
        host.server.loop.call_soon_threadsafe(host.server.loop.call_exception_handler, context)
    later(host, 0)
    assert len(caplog.records) == 1


def test_a_connection_without_a_request_is_closed_after_a_while(host: Host) -> None:
    with closing(connect(host)) as connection:
        for _ in range(2):  # the second just in time
            connection.sendall(HEALTH)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(1 << 16)
            later(host, limits.SECONDS["idle"] - 1)
        later(host, limits.SECONDS["idle"] + 1)
        assert connection.recv(1 << 16) == b""


def test_requests_that_come_together_are_answered_in_order(host: Host) -> None:
    lost = HEALTH.replace(b"/health", b"/nowhere")
    text = post({"prompt": "a", "max_tokens": 1}).replace(b"Connection: close\r\n", b"")
    with closing(connect(host)) as connection:
        connection.sendall(HEALTH + lost + text + HEALTH + closed(lost))
        answers = connection.makefile("rb").read()
    statuses = [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 404, 200, 200, 404]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("HEAD", "/health", 200), ("HEAD", "/", 200), ("HEAD", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405), ("OPTIONS", "/health", 405), ("OPTIONS", "*", 404),
        ("TRACE", "/health", 405), ("GET", "http://localhost/health", 404),
        ("DELETE", "/v1/models", 405), ("CONNECT", "localhost:80", 404),
    ],
)  # fmt: skip
def test_other_methods_and_targets_get_an_answer(
    method: str, target: str, status: int, host: Host
) -> None:
    request = HEALTH.replace(b"GET /health", f"{method} {target}".encode())
    received, body = ask(host, closed(request))
    assert received == status
    assert (body == b"") == (method == "HEAD")


def test_bodies_that_are_too_many_together_are_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_BODIES_BYTES", 1000)
    head, _, content = post({"prompt": "a" * 700, "truncate_prompt": True}).partition(END)
    with closing(connect(host)) as first:
        first.sendall(head + END + content[:600])
        assert ask(host, closed(HEALTH))[0] == 200  # the server has read both parts by now
        status, answer = ask(host, head + END + content)
        assert (status, json.loads(answer)["error"]["code"]) == (503, "overloaded")
        with closing(connect(host)) as second:  # who is refused can send all, and sees why
            second.sendall(head + END + content[:-1])
            assert ask(host, closed(HEALTH))[0] == 200
            second.sendall(content[-1:])
            assert read(second)[0] == 503
        first.sendall(content[600:])
        assert read(first)[0] == 200
    assert ask(host, head + END + content)[0] == 200  # their bytes are counted no more


def test_beyond_the_budget_of_all_requests_one_is_refused_with_a_time_to_wait(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "MAX_COST_TOGETHER", 40_000)
    eos = str(host.run.tokenizer.eos)
    body = {"prompt": "a", "max_tokens": 32768, "logit_bias": {eos: -100}, "stream": True}
    with closing(connect(host)) as first, closing(connect(host)) as second:
        first.sendall(post(body))
        assert first.recv(1)
        second.sendall(post(body))
        answer = second.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer
    assert b"tokens together; at most 40000" in answer


def test_work_in_a_thread_does_not_hold_up_a_stop(
    make_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Four texts take endless time to encode, as many as there are threads, and one waits."""
    host = Host(*make_run("modern"))
    host.start()
    monkeypatch.setattr(limits, "GRACE_SECONDS", 0.0)
    begun, end = threading.Semaphore(0), threading.Event()

    def parse(*given: Any) -> Any:
        begun.release()
        end.wait(60)
        raise ApiError(400, "too late")

    monkeypatch.setattr(api, "parse", parse)
    waiting = [connect(host) for _ in range(N_THREADS + 1)]
    for connection in waiting:
        connection.sendall(post({"prompt": "a" * SMALL_BYTES}))
    assert all(begun.acquire(timeout=60) for _ in range(N_THREADS))
    assert not begun.acquire(blocking=False)
    assert ask(host, closed(HEALTH))[0] == 200  # the event loop is free
    host.stop()
    answers = [read(connection) for connection in waiting]
    end.set()
    assert [status for status, _ in answers] == [503] * (N_THREADS + 1)
    assert all(json.loads(body)["error"]["code"] == "stopping" for _, body in answers)
    assert capfd.readouterr() == ("", "")
    for connection in waiting:
        connection.close()


def test_a_forward_pass_does_not_hold_up_a_stop(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GRACE_SECONDS", 0.0)
    begun, end, logits = threading.Event(), threading.Event(), host.backend.logits

    def slow(*given: Any) -> Any:
        begun.set()
        end.wait(60)
        return logits(*given)

    monkeypatch.setattr(host.backend, "logits", slow)
    with closing(connect(host)) as connection:
        connection.sendall(post({"prompt": "a"}))
        assert begun.wait(60)
        host.stop()
        assert read(connection)[0] == 503
    end.set()
    host.engine.stop()


def test_whatever_is_still_running_the_process_ends(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[Any] = []
    monkeypatch.setattr(limits.threading, "Timer", lambda *given: timers.append(given) or Mock())
    host.server.handle_exit(15, None)
    [(seconds, exit_at_once, numbers)] = timers
    exit_at_once(*numbers)
    assert (host.exits, seconds) == ([15], limits.STOP_SECONDS)
    assert limits.GRACE_SECONDS + 0.5 + api.ENGINE_SECONDS < limits.STOP_SECONDS < 5


def test_large_bodies_are_read_one_at_a_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, parse = 0, 0, api.parse
    lock = threading.Lock()

    def count(*given: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        try:
            return parse(*given)
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(api, "parse", count)
    request = post({"prompt": "a" * 100_000, "truncate_prompt": True, "max_tokens": 1})
    connections = [connect(host) for _ in range(3)]
    for connection in connections:
        connection.sendall(request)
    assert [read(connection)[0] for connection in connections] == [200] * 3
    assert most == 1
    for connection in connections:
        connection.close()


def test_only_small_bodies_are_read_in_the_event_loop(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, parse = list[int](), api.parse

    def record(*given: Any) -> Any:
        threads.append(threading.get_ident())
        return parse(*given)

    async def find_thread() -> int:
        return threading.get_ident()

    monkeypatch.setattr(api, "parse", record)
    for prompt in ("a", "a" * SMALL_BYTES):
        body = {"prompt": prompt, "max_tokens": 1, "truncate_prompt": True}
        assert ask(host, post(body))[0] == 200
    loop_thread = asyncio.run_coroutine_threadsafe(find_thread(), host.server.loop).result(30)
    assert [thread == loop_thread for thread in threads] == [True, False]


def test_nothing_in_the_event_loop_grows_with_an_answer(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and JSON of 12,000 alternatives: small pieces, or in another thread."""
    loop_thread, in_loop = threading.get_ident(), list[int]()
    build, write = ResponseBuilder.logprobs, json.dumps

    async def find_thread() -> int:
        return threading.get_ident()

    def record(size: int) -> None:
        if threading.get_ident() == loop_thread:
            in_loop.append(size)

    def logprobs(builder: Any, rows: Any, length: int) -> Any:
        record(sum(1 + len(row.likeliest or ()) for row in rows) * 100)
        return build(builder, rows, length)

    def dumps(value: Any, **options: Any) -> str:
        record(len(text := write(value, **options)))
        return text

    assert ask(host, closed(HEALTH))[0] == 200  # it runs
    loop_thread = asyncio.run_coroutine_threadsafe(find_thread(), host.server.loop).result(30)
    monkeypatch.setattr(ResponseBuilder, "logprobs", logprobs)
    monkeypatch.setattr(json, "dumps", dumps)
    body = {"prompt": "a", "max_tokens": 150, "n": 4, "logprobs": 20, "seed": 1}
    body["logit_bias"] = {str(host.run.tokenizer.eos): -100}
    sizes = [len(ask(host, post({**body, "stream": stream}))[1]) for stream in (False, True)]
    assert min(sizes) > 200_000
    assert in_loop
    assert max(in_loop) <= 100 * MAX_ENTRIES


def test_the_requests_in_flight_have_a_budget() -> None:
    from mlx_randygpt.serve import MAX_COST_TOGETHER, ApiError

    in_flight, first, second = InFlight(), object(), object()
    in_flight.add(first, MAX_COST_TOGETHER)  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="try again later"):
        in_flight.add(second, 1)  # type: ignore[arg-type]
    in_flight.discard(first)  # type: ignore[arg-type]
    in_flight.add(second, 1)  # type: ignore[arg-type]
