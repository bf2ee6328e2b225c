"""Compare `mlxgpt serve` with llama.cpp's server: tokens per second of simultaneous requests.

    pip install '.[serve,fast]' xllamacpp
    python benchmarks/llama_cpp.py --checkpoint checkpoints/checkpoint_best.safetensors
        [--streams 1 8 32 128 256] [--tokens 50] [--turns 5] [--outtype f32] [--json FILE]

The checkpoint must be one that llama.cpp can run (`--recipe portable` or `--arch gpt2`). Both
servers run the whole time, with as many threads as there are cores, and take turns. N requests are
sent at the same time, each for the same number of tokens with temperature 0.8 and top-p 0.9; what
counts is the time until the last response has arrived. Prompt and text must fit into the context.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from serve import Client, run_server
from turns import Runners, interleave, rows, save, show

from mlx_randygpt.backends.numpy.backend import available_cores
from mlx_randygpt.checkpoint import load_checkpoint
from mlx_randygpt.exchange.export import export

# llama.cpp would end a text where its tokenizer's last token is drawn; ours has no such token here
EXTRA: dict[str, dict[str, object]] = {"llama.cpp": {"ignore_eos": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--tokens", type=int, default=50, help="of each text")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--outtype", default="f32", help="of the GGUF file: f32, f16 or q8_0")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    saved = load_checkpoint(options.checkpoint, weights_only=True)
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as servers:
        export(saved, "gguf", Path(work, "gguf"), outtype=options.outtype)
        file = Path(work, "gguf", "model.gguf")
        our_port, _ = servers.enter_context(run_server(options.checkpoint, "numpy"))
        ports = {
            "mlxgpt": our_port,
            "llama.cpp": servers.enter_context(
                their_server(file, max(options.streams), saved.model.block_size)
            ),
        }
        for n_streams in options.streams:
            n = n_streams * options.tokens
            runners: Runners = {
                who: partial(run_clients, port, n_streams, options.tokens, EXTRA.get(who, {}))
                for who, port in ports.items()
            }
            found = rows(interleave(runners, options.turns, 1), dict.fromkeys(runners, n))
            show(f"{n_streams} streams of {options.tokens} tokens", found)
            save(options.json and options.json.with_stem(f"{options.json.stem}-{n_streams}"),
                 settings=vars(options), rows=found)  # fmt: skip


def run_clients(port: int, n_streams: int, n_tokens: int, extra: dict[str, object]) -> None:
    """Send N requests at the same time and wait for all responses."""
    asyncio.run(ask(port, n_streams, n_tokens, extra))


async def ask(port: int, n_streams: int, n_tokens: int, extra: dict[str, object]) -> None:
    """Send N requests at the same time, and check that every response has `n_tokens` tokens."""
    settings = {"prompt": "ROMEO:", "max_tokens": n_tokens, "temperature": 0.8, "top_p": 0.9}
    contents = (json.dumps(settings | extra | {"seed": i}).encode() for i in range(n_streams))
    answers = await asyncio.gather(
        *(Client(port).whole("/v1/completions", content) for content in contents)
    )
    for status, answer in answers:
        written = json.loads(answer)["usage"]["completion_tokens"] if status == 200 else answer
        assert written == n_tokens, f"status {status}: {written!r}, not {n_tokens} tokens"


@contextlib.contextmanager
def their_server(file: Path, n_streams: int, context: int) -> Iterator[int]:
    """Run llama.cpp's server on a GGUF file and yield its port."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=run_llama_cpp, args=(theirs, file, n_streams, context))
    process.start()
    try:
        address = ours.recv()
        yield int(re.findall(r"\d+", address)[-1])
    finally:
        process.terminate()
        process.join()


def run_llama_cpp(pipe: Connection, file: Path, n_streams: int, context: int) -> None:
    """Run llama.cpp's server, with one slot per stream, until the process is terminated."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.n_ctx = n_streams, n_streams * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = available_cores()
    params.port = 0
    params.n_threads_http = n_streams
    server = xllamacpp.Server(params)
    pipe.send(str(server.listening_address))
    time.sleep(1e6)


if __name__ == "__main__":
    main()
