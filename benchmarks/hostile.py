"""What hostile clients do to `mlxgpt serve`: a server of its own for each situation.

Meanwhile another process asks for /health up to thirty times a second. Measured are those answers,
the peak of the server's memory, the statuses that the clients got, how long a stop by SIGTERM
takes while the clients go on, and the tracebacks in the server's log.

    python benchmarks/hostile.py --checkpoint checkpoints/checkpoint_best.safetensors
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from mlx_randygpt.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import initial_state
from mlx_randygpt.progress import Progress
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
END = b"\r\n\r\n"
STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)
MAX_SECONDS, MAX_STOP_SECONDS, MAX_MB = 0.5, 5.0, 500.0
LONG = {"prompt": "a", "max_tokens": 32768}
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}


def post(path: str, body: Any, *headers: str) -> bytes:
    """Return a request whose connection ends with its answer; bytes are sent as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = f"Content-Length: {len(content)}"
    return get(path, "Host: localhost", length, *headers, method="POST") + content


def complete(**body: Any) -> bytes:
    return post("/v1/completions", body)


def get(target: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = "".join(f"{line}\r\n" for line in (*headers, "Connection: close"))
    return f"{method} {target} HTTP/{version}\r\n{lines}\r\n".encode()


@dataclass
class Clients:
    """The hostile clients of one server, until a deadline."""

    port: int
    ends: float
    statuses: Counter[str] = field(default_factory=Counter)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, request: bytes) -> None:
        """Send a request and count the statuses of its answers."""
        try:
            reader, writer = await self.connect()
        except OSError:
            self.statuses["refused"] += 1
            await asyncio.sleep(0.2)
            return
        answer = b""
        with contextlib.suppress(OSError):
            writer.write(request)
            answer = await reader.read(-1)
        writer.close()
        head, _, rest = answer.partition(END)
        pipelined = STATUS.findall(rest) if request.count(b" HTTP/1.") > 1 else []
        found = [*STATUS.findall(head), *pipelined]
        self.statuses.update([status.decode() for status in found] or ["closed"])

    async def repeat(self, *requests: bytes, at_once: int = 8) -> None:
        """Send these requests in turn until the deadline."""
        turn = cycle(requests)

        async def work() -> None:
            while time.monotonic() < self.ends:
                await self.ask(next(turn))

        await asyncio.gather(*(work() for _ in range(at_once)))

    async def drip(self, first: bytes, rest: bytes, at_once: int, pause: float) -> None:
        """Send `first`, then `rest` again and again, and read nothing before the end."""

        async def work() -> None:
            while time.monotonic() < self.ends:
                with contextlib.suppress(OSError):
                    reader, writer = await self.connect()
                    writer.transport.pause_reading()  # type: ignore[attr-defined]
                    writer.write(first)
                    while time.monotonic() < self.ends and not writer.transport.is_closing():
                        writer.write(rest)
                        await asyncio.wait_for(writer.drain(), 1)
                        await asyncio.sleep(pause)
                    writer.transport.resume_reading()  # type: ignore[attr-defined]
                    answer = await asyncio.wait_for(reader.read(1 << 16), 1)
                    found = STATUS.findall(answer)
                    self.statuses.update([status.decode() for status in found] or ["closed"])
                    writer.close()
                await asyncio.sleep(0.05)

        await asyncio.gather(*(work() for _ in range(at_once)))


# Situations


async def nobody(clients: Clients) -> None:
    await asyncio.sleep(0)


async def odd_requests(clients: Clients) -> None:
    texts = ({"prompt": "ab", "logprobs": 5}, {"prompt": [0, 2, 1], "echo": True, "logprobs": 1},
             {"prompt": "a\u4e2db", "echo": True, "logprobs": 0}, {"prompt": "A\r\nB:"},
             {"prompt": "\ufeffA", "stop": "\r\n"}, {"prompt": "a", "functions": None},
             {"prompt": "a", "seed": -1}, {"prompt": "a" * 5000}, {"prompt": "a", "topk": 1},
             {"prompt": "a" * 5000, "truncate_prompt": True}, {"prompt": "\ud800"})  # fmt: skip
    requests = [complete(**{"max_tokens": 1, "stream": i % 2 > 0, **text})
                for text in texts for i in range(2)]  # fmt: skip
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
    requests.append(post("/v1/chat/completions", {"messages": chat, "max_tokens": 1}))
    await clients.repeat(*requests)


async def streams_of_logprobs(clients: Clients) -> None:
    body = {"prompt": "a", "max_tokens": 3120, "stream": True, "n": 8, "logprobs": 20}
    await clients.repeat(complete(**body), complete(**{**body, "max_tokens": 32768}), at_once=4)


async def large_answers(clients: Clients) -> None:
    body = {"prompt": "a", "max_tokens": 390, "n": 64, "logprobs": 20}
    await clients.repeat(complete(**body), complete(**{**body, "max_tokens": 32768}), at_once=16)


async def silent_connections(clients: Clients) -> None:
    await clients.drip(b"", b"", at_once=200, pause=0.5)


async def endless_headers(clients: Clients) -> None:
    many = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 10_000 + b"\r\n"
    head = b"GET /health HTTP/1.1\r\nX: "
    await asyncio.gather(
        clients.drip(head, b"a" * (1 << 20), at_once=8, pause=0),
        clients.repeat(many, HEALTH[:-2] + b"X: " + b"a" * 300_000 + END, at_once=4),
    )


async def readers_that_stand_still(clients: Clients) -> None:
    body = {"prompt": "a", "max_tokens": 600, "stream": True, "n": 2, "logprobs": 20}
    await clients.drip(complete(**body), b"", at_once=40, pause=0.2)


async def slow_bodies(clients: Clients) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    await clients.drip(head, b"a", at_once=100, pause=0.2)


async def large_bodies(clients: Clients) -> None:
    ids = b'{"prompt": [' + b"1," * 500_000 + b'1], "truncate_prompt": true, "max_tokens": 1}'
    text = {"prompt": "a" * 1_000_000, "truncate_prompt": True, "max_tokens": 1}
    lists = {"prompt": [[i] * 5000 for i in range(1, 40)], "truncate_prompt": True}
    requests = [post("/v1/completions", ids), complete(**text), complete(**lists, max_tokens=1)]
    await clients.repeat(*requests, at_once=100)


async def odd_json(clients: Clients) -> None:
    bodies = (
        b"[" * 500_000, b'{"a":' * 150_000, b'{"prompt":"a","max_tokens":1,"max_tokens":2}',
        b'{"prompt":"a","seed":' + b"9" * 900_000 + b"}", b'{"prompt":"a","seed":1e999}',
        b'{"prompt":"a","top_p":NaN}', b'{"prompt":"\\ud800","max_tokens":1}', b"\xff\xfe", b"",
        b'{"prompt":"a",' + b",".join(b'"x%d":1' % i for i in range(60_000)) + b"}",
        b'{"messages":[' + b",".join([b'{"role":"user","content":"a"}'] * 20_000) + b"]}",
    )  # fmt: skip
    paths = ("/v1/completions", "/v1/chat/completions", "/", "/attention", "/copies")
    await clients.repeat(*(post(path, body) for body in bodies for path in paths))


async def odd_headers(clients: Clients) -> None:
    upgrade = ("Host: localhost", "Upgrade: websocket")
    await clients.repeat(
        get("/health", "Host: evil.com"), get("/health", "Host: [::1].evil.com"),
        get("/health", "Host: localhost", "Origin: http://evil.com"), get("/health"),
        get("/health", "Host: localhost", "Host: localhost"), get("/health", version="1.0"),
        get("/health", *upgrade), get("http://localhost/health", "Host: localhost"),
        get("/health", "Host: localhost", method="HEAD"), get("*", "Host: localhost",
        method="OPTIONS"), get("/v1/completions", "Host: localhost", method="OPTIONS"),
        get("/%00/\ud7ff", "Host: localhost"), get("/" + "a" * 60_000, "Host: localhost"),
        get("localhost:80", "Host: localhost", method="CONNECT"), b"\x16\x03\x01\x02\x00" + END,
        HEALTH * 50 + get("/health", "Host: localhost"),
        post("/health", b"a" * 1000), post("/v1/completions", b"{}", "Transfer-Encoding: chunked"),
    )  # fmt: skip


async def whole_answers(clients: Clients) -> None:
    body = {**LONG, "n": 4}
    await clients.repeat(complete(**body), complete(**body, stream=True), at_once=8)


async def texts_that_panic(clients: Clients) -> None:
    text = "a" * 34 + "!"
    chat = {"messages": [{"role": "user", "content": text}]}
    requests = complete(prompt=text), post("/v1/chat/completions", chat), post("/", LONG)
    await clients.repeat(*requests, complete(prompt="aa!", max_tokens=9))


async def long_texts(clients: Clients) -> None:
    text = Path(__file__).read_text()
    long = {"prompt": (text * 200)[:900_000], "truncate_prompt": True, "max_tokens": 1}
    copies = {"text": (text * 20)[: 1 << 16]}
    chat = {"messages": [{"role": "user", "content": text[:900]}] * 1000, "max_tokens": 1}
    requests = complete(**long), post("/copies", copies), post("/v1/chat/completions", chat)
    await clients.repeat(*requests, post("/attention", {"text": text, "layer": 0, "head": 0}))


@dataclass(frozen=True)
class Situation:
    """What the clients do, and how the server is started."""

    act: Callable[[Clients], Awaitable[None]]
    options: tuple[str, ...] = ()
    n_files: int = 0  # limit on open files; 0: as it is
    model: str = "given"  # or "subword", or "panics": an untrained one with such a tokenizer


SITUATIONS = {
    "nobody, for comparison": Situation(nobody),
    "odd prompts and fields": Situation(odd_requests),
    "streams with many log-probabilities": Situation(streams_of_logprobs),
    "large answers, up to the budget": Situation(large_answers),
    "200 silent connections, ulimit -n 128": Situation(silent_connections, n_files=128),
    "headers without end": Situation(endless_headers),
    "clients that never read": Situation(readers_that_stand_still),
    "slow bodies": Situation(slow_bodies),
    "large bodies": Situation(large_bodies),
    "deep, large and invalid JSON": Situation(odd_json),
    "hosts, methods, targets, pipelines": Situation(odd_headers),
    "whole answers at SIGTERM": Situation(whole_answers),
    "a tokenizer that panics": Situation(texts_that_panic, model="panics"),
    "long texts to encode": Situation(long_texts, model="subword"),
    "long texts to compare": Situation(long_texts, options=("--check",)),
}


# Measuring


def probe(port: int, stop: Any, results: Any) -> None:
    """Ask for /health until `stop` is set; put the seconds of each answer, failures as infinite."""
    seconds = []
    while not stop.is_set():
        started = time.perf_counter()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(HEALTH)
                is_right = b" 200 " in connection.recv(1 << 12).partition(b"\n")[0]
        except OSError:
            is_right = False
        if is_right or not stop.is_set():
            seconds.append(time.perf_counter() - started if is_right else float("inf"))
        stop.wait(0.03)
    results.put(seconds)


def start(checkpoint: Path, situation: Situation, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server; return it and its port."""
    command = [sys.executable, "-m", "mlx_randygpt", "serve", "--port", "0", "--backend", "numpy"]
    command += ["--checkpoint", str(checkpoint), *situation.options]

    def limit() -> None:
        if situation.n_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (situation.n_files, situation.n_files))

    environment = {**os.environ, "NUMBA_CACHE_DIR": str(log.parent), "RUST_BACKTRACE": "0"}
    with log.open("wb") as stderr:
        server = subprocess.Popen(command, stderr=stderr, env=environment, preexec_fn=limit)
    while not (found := re.search(r"http://127\.0\.0\.1:(\d+) ", log.read_text())):
        if server.poll() is not None:
            raise SystemExit(f"the server did not start: {log.read_text()}")
        time.sleep(0.05)
    return server, int(found[1])


async def act(situation: Situation, port: int, seconds: float, stop: Callable[[], None]) -> Any:
    """Let the clients act; call `stop` after so many seconds, while they go on."""
    clients = Clients(port, time.monotonic() + seconds + MAX_STOP_SECONDS)
    asyncio.get_running_loop().call_later(seconds, stop)
    task = asyncio.ensure_future(situation.act(clients))
    await asyncio.sleep(seconds)
    with contextlib.suppress(TimeoutError):
        clients.ends = time.monotonic()  # no new requests: those that run see how it ends
        await asyncio.wait_for(task, MAX_STOP_SECONDS + 1)
    return clients.statuses


def measure(checkpoint: Path, situation: Situation, seconds: float, log: Path) -> dict[str, Any]:
    """Run one situation."""
    server, port = start(checkpoint, situation, log)
    processes = multiprocessing.get_context("fork")
    stop, results = processes.Event(), processes.SimpleQueue()
    prober = processes.Process(target=probe, args=(port, stop, results))
    prober.start()
    facts: dict[str, Any] = {}

    def end() -> None:
        stop.set()
        status = Path(f"/proc/{server.pid}/status").read_text()
        facts["peak_mb"] = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1e3
        facts["stopped"] = time.perf_counter()
        server.send_signal(signal.SIGTERM)

    async def run() -> Counter[str]:
        waiting = asyncio.create_task(asyncio.to_thread(wait))
        statuses: Counter[str] = await act(situation, port, seconds, end)
        await waiting
        return statuses

    def wait() -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(seconds + 20)
        facts["ended"] = time.perf_counter()

    try:
        statuses = asyncio.run(run())
    finally:
        server.kill()
    health = sorted(results.get())
    prober.join()
    said = log.read_text()
    return {
        "health_n": len(health), "health_p50_ms": 1e3 * statistics.median(health),
        "health_p99_ms": 1e3 * health[min(len(health) - 1, int(0.99 * len(health)))],
        "health_max_ms": 1e3 * health[-1], "peak_mb": facts["peak_mb"],
        "stop_seconds": facts["ended"] - facts["stopped"], "exit_code": server.returncode,
        "statuses": dict(sorted(statuses.items())), "tracebacks": said.count("Traceback"),
        "log_lines": len(said.splitlines()) - 2,
    }  # fmt: skip


def faults(row: dict[str, Any]) -> list[str]:
    """Return what is not as promised."""
    checks = {
        "slow /health": row["health_p99_ms"] > 1e3 * MAX_SECONDS,
        "memory": row["peak_mb"] > MAX_MB,
        "slow stop": row["stop_seconds"] > MAX_STOP_SECONDS,
        "tracebacks": row["tracebacks"] > 0,
        "5xx": any(code[0] == "5" and code != "503" for code in row["statuses"]),
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


def other_models(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """Write untrained models with subword tokenizers; return the checkpoints by name."""
    saved = load_checkpoint(checkpoint, weights_only=True)
    model = {"type": "BPE", "vocab": {"a": 0, "!": 1}, "merges": []}
    panics = {"version": "1.0", "model": model, "pre_tokenizer": {**BACKTRACKING, "invert": False}}
    tokenizers = {
        "subword": SubwordTokenizer.train("bpe", [Path(__file__).read_text()], 512),
        "panics": SubwordTokenizer.from_file(json.dumps(panics)),
    }
    paths = {"given": checkpoint}
    for name, tokenizer in tokenizers.items():
        config = ModelConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=tokenizer.vocab_size)
        state = initial_state(config, 1)
        paths[name] = folder / name / "checkpoint.safetensors"
        paths[name].parent.mkdir()
        facts = (tokenizer.to_json(), saved.data, "numpy", state)
        save_checkpoint(paths[name], Checkpoint(config, saved.train, Progress(), *facts))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each situation")
    parser.add_argument("--only", default="", help="situations whose name has this text")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows, n_faults = {}, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = other_models(given.checkpoint, folder)
        for title, situation in SITUATIONS.items():
            if given.only not in title:
                continue
            log = folder / "log"
            row = rows[title] = measure(paths[situation.model], situation, given.seconds, log)
            wrong = faults(row)
            n_faults += len(wrong)
            if given.json:
                continue
            counts = ", ".join(f"{code}: {n}" for code, n in row["statuses"].items())
            print(f"{title}: /health {row['health_p50_ms']:.0f} ms, 99 % {row['health_p99_ms']:.0f}"
                  f" ms of {row['health_n']}; peak {row['peak_mb']:.0f} MB; stop"
                  f" {row['stop_seconds']:.1f} s; {row['log_lines']} lines of log; {counts}"
                  f"{'; WRONG: ' if wrong else ''}{', '.join(wrong)}", flush=True)  # fmt: skip
            if wrong or row["log_lines"] > 1:
                print(log.read_text()[-1500:], flush=True)
    if given.json:
        print(json.dumps(rows))
    sys.exit(n_faults > 0)


if __name__ == "__main__":
    main()
