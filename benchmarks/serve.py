"""`mlxgpt serve` under load: are the answers right, how fast do they come, does memory stay flat.

A thousand requests of mixed lengths, 64 at a time, a tenth of them cancelled midway and a tenth
malformed. Each text is compared with what the same seed writes alone, without a server. Then the
speed of one stream, and the time to a first token, idle and beside fifteen endless streams.

    python benchmarks/serve.py --checkpoint checkpoints/checkpoint_best.safetensors [--tokens 1 120]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from mlx_randygpt.backends import make_backend
from mlx_randygpt.checkpoint import load_checkpoint
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate
from mlx_randygpt.tokenizers import tokenizer_from_json

MALFORMED = (
    b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": 3}', b'{"prompt": "a", "n": "many"}',
    b'{"prompt": "a", "temperature": NaN}', b'{"prompt": [99999]}', b'{"prompt": []}',
)  # fmt: skip
N_ROUNDS = 4
WORDS = "ROMEO: what light through yonder window breaks, it is the east and so on"
LONG = {"prompt": "ROMEO:", "max_tokens": 400, "temperature": 0.8, "seed": 1}


@dataclass
class Request:
    """One of the thousand, and what the same settings write alone."""

    kind: str  # "whole" | "stream" | "cancelled" | "malformed"
    body: bytes
    expected: str = ""


def plan(n: int, checkpoint: Path, backend: str, tokens: tuple[int, int]) -> list[Request]:
    """The requests, the same each time; the texts are written one by one."""
    saved = load_checkpoint(checkpoint, weights_only=True)
    built = make_backend(backend, saved.model, replace(saved.train, threads=0), saved.state)
    tokenizer, random, requests = tokenizer_from_json(saved.tokenizer), Random(1), []
    for seed in range(n):
        kind = random.choices(("malformed", "cancelled", "whole", "stream"), (10, 10, 60, 20))[0]
        prompt = WORDS[: random.randint(1, min(60, saved.model.block_size))]
        settings = {
            "max_tokens": random.randint(*tokens), "seed": seed,
            "temperature": random.choice((0.0, 0.7, 0.8, 1.2)), "top_p": random.choice((0.9, 1.0)),
        }  # fmt: skip
        if kind == "malformed":
            requests.append(Request(kind, random.choice(MALFORMED)))
            continue
        body = {"prompt": prompt, **settings, "stream": kind != "whole"}
        expected, ids = "", tokenizer.encode(prompt).tolist()
        config = SampleConfig(**settings)  # type: ignore[arg-type]
        for [sample] in generate(built, saved.model, tokenizer, ids, config):
            expected = sample.text
        requests.append(Request(kind, json.dumps(body).encode(), expected))
    return requests


class Client:
    """Asks as cheaply as can be, so that the load is the server's."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def send(self, path: str, body: bytes) -> asyncio.StreamReader:
        reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return reader

    async def whole(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        reader = await self.send(path, body)
        answer = await reader.read()
        self.writer.close()
        head, _, content = answer.partition(b"\r\n\r\n")
        if b"chunked" in head:
            content = b"".join(re.split(rb"(?:^|\r\n)[0-9a-f]+\r\n", content))
        return int(head.split(b" ", 2)[1]), content

    async def first_token(self, body: dict[str, Any]) -> float:
        """Seconds from the request to the first piece of its text."""
        started = time.perf_counter()
        reader = await self.send("/v1/completions", json.dumps({**body, "stream": True}).encode())
        await reader.readuntil(b"data: ")
        seconds = time.perf_counter() - started
        self.writer.close()
        return seconds


async def carry_out(request: Request, port: int) -> tuple[str, int]:
    """What came of one request, and how many tokens it brought."""
    client = Client(port)
    if request.kind == "cancelled":
        reader = await client.send("/v1/completions", request.body)
        await reader.readuntil(b"data: ")
        client.writer.close()
        return "cancelled", 0
    status, content = await client.whole("/v1/completions", request.body)
    if request.kind == "malformed":
        return ("refused" if status == 400 else f"wrong status {status}"), 0
    if status != 200:
        return f"status {status}", 0
    if request.kind == "stream":
        text = streamed_text(content)
        n_tokens = len(text)
    else:
        answer = json.loads(content)
        text, n_tokens = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    return ("right" if text == request.expected else "wrong"), n_tokens


def streamed_text(content: bytes) -> str:
    """The text of a stream; a model of characters writes one in a token."""
    events = [json.loads(part) for part in re.findall(rb"data: (\{.*?\})\n\n", content)]
    return "".join(event["choices"][0]["text"] for event in events)


async def load(requests: list[Request], port: int, at_once: int) -> dict[str, Any]:
    """All of them, `at_once` at a time."""
    waiting, outcomes, tokens = list(reversed(requests)), Counter[str](), 0

    async def worker() -> None:
        nonlocal tokens
        while waiting:
            outcome, n = await asyncio.wait_for(carry_out(waiting.pop(), port), 120)
            outcomes[outcome] += 1
            tokens += n

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    seconds = time.perf_counter() - started
    return {"outcomes": dict(outcomes), "seconds": seconds, "tokens_per_second": tokens / seconds}


async def one_stream(port: int) -> float:
    """Tokens per second of one text at a time, streamed."""
    started = time.perf_counter()
    body = json.dumps({**LONG, "stream": True}).encode()
    _, content = await Client(port).whole("/v1/completions", body)
    return len(streamed_text(content)) / (time.perf_counter() - started)


async def first_tokens(port: int) -> tuple[float, float, float, float]:
    """Seconds to a first token: idle, beside 15 endless streams, of 16 that come at once, and of
    16 with prompts of 16 lengths; medians."""
    short = {**LONG, "max_tokens": 8}
    idle = [await Client(port).first_token(short) for _ in range(20)]
    endless = json.dumps({**LONG, "max_tokens": 30_000, "stream": True}).encode()
    others = [Client(port) for _ in range(15)]
    readers = [await client.send("/v1/completions", endless) for client in others]
    drains = [asyncio.create_task(reader.read()) for reader in readers]
    await asyncio.sleep(0.5)
    beside = [await Client(port).first_token(short) for _ in range(20)]
    for client in others:
        client.writer.close()
    await asyncio.gather(*drains, return_exceptions=True)
    await asyncio.sleep(0.5)
    same, mixed = list[float](), list[float]()
    bodies = [{**short, "prompt": WORDS[: 7 + 3 * i]} for i in range(16)]
    for _ in range(3):
        for found, asked in ((same, [short] * 16), (mixed, bodies)):
            found += await asyncio.gather(*(Client(port).first_token(body) for body in asked))
            await asyncio.sleep(0.2)
    idle_s, beside_s, same_s, mixed_s = map(statistics.median, (idle, beside, same, mixed))
    return idle_s, beside_s, same_s, mixed_s


def resident_mb(pid: int) -> float:
    """Memory of a process now."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1e3 if found else 0.0


async def measure(requests: list[Request], port: int, pid: int, at_once: int) -> dict[str, Any]:
    """Loads, single streams and first tokens in turns, so that a slow spell hits all alike."""
    await load(requests[:50], port, at_once)  # warm
    memory, rounds, outcomes = [resident_mb(pid)], list[dict[str, float]](), Counter[str]()
    for part in range(N_ROUNDS):
        single = [await one_stream(port) for _ in range(2)]
        found = await load(requests[part::N_ROUNDS], port, at_once)
        single += [await one_stream(port) for _ in range(2)]
        outcomes.update(found["outcomes"])
        memory.append(resident_mb(pid))
        idle, beside, same, mixed = await first_tokens(port)
        one = statistics.median(single)
        rounds.append({
            "tokens_per_second": found["tokens_per_second"], "one_stream_tokens_per_second": one,
            "ratio": found["tokens_per_second"] / one, "first_token_idle_ms": 1e3 * idle,
            "beside_15_over_idle": beside / idle, "16_at_once_over_idle": same / idle,
            "16_lengths_at_once_over_idle": mixed / idle,
        })  # fmt: skip
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    counts = {"requests": len(requests), "at_once": at_once, "outcomes": dict(outcomes)}
    return {**counts, **medians, "memory_mb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--tokens", type=int, nargs=2, default=[1, 120], help="of a text")
    given = parser.parse_args()
    requests = plan(given.requests, given.checkpoint, given.backend, tuple(given.tokens))
    with run_server(given.checkpoint, given.backend) as (port, pid):
        print(json.dumps(asyncio.run(measure(requests, port, pid, given.at_once))))


@contextlib.contextmanager
def run_server(checkpoint: Path, backend: str) -> Iterator[tuple[int, int]]:
    """Run `mlxgpt serve` and yield its port and process id."""
    command = [sys.executable, "-m", "mlx_randygpt", "serve", "--port", "0"]
    command += ["--checkpoint", str(checkpoint), "--backend", backend]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        serving = next(line for line in process.stderr if line.startswith("Serving"))
        found = re.search(r":(\d+) ", serving)
        assert found is not None, serving
        try:
            yield int(found[1]), process.pid
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
