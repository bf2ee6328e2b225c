"""Decoding beside PyTorch: one stream and many, sampling included, interleaved, medians.

    python benchmarks/decode.py [--preset small] [--tokens 100] [--turns 7]
                                [--streams 1 8 32 128 256] [--torch-threads 1 2] [--json FILE]

`torch kv` keeps keys and values, of all streams in one batch, and is as fast as the better of one
thread and all; `nanogpt generate` reads the whole context again for each token, as nanoGPT does.
Both draw with temperature 0.8 from the top 50. Ours draws with temperature 0.8 and top-p 0.9, the
defaults of `mlxgpt sample`. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nanogpt
import torch
from torch_decode import nanogpt_generate, torch_kv
from turns import Runners, interleave, rows, save, show

from mlx_randygpt.backends.numpy import decode
from mlx_randygpt.backends.numpy.backend import NumpyBackend, available_cores
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import initial_state
from mlx_randygpt.recipes import PRESETS, RECIPES
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import Continuation, Streams, extend
from mlx_randygpt.tokenizers.chars import CharTokenizer

TOKENIZER = CharTokenizer("".join(map(chr, range(64, 128))))
VOCAB = TOKENIZER.vocab_size  # 67


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--tokens", type=int, default=100, help="in one run")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument(
        "--torch-threads", type=int, nargs="+", default=sorted({1, available_cores()})
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    preset, n = PRESETS[options.preset], options.tokens
    sizes = (VOCAB, preset.block_size, preset.n_layer, preset.n_head, preset.n_embd)
    model = nanogpt.Model(*sizes).eval()
    runners: Runners = {}
    for b in options.streams:
        runners[f"{b}: numba"] = ours(options.preset, b, n, compiled=True)
        runners[f"{b}: without numba"] = ours(options.preset, b, n, compiled=False)
        for threads in options.torch_threads:
            runners[f"{b}: torch kv, {threads} threads"] = threaded(
                threads, partial(torch_kv, model, n, b)
            )
    if 1 in options.streams:
        runners["1: nanogpt generate"] = threaded(
            max(options.torch_threads), lambda: nanogpt_generate(model, preset.block_size, n)
        )
    tokens = {name: int(name.partition(":")[0]) * n for name in runners}
    found = rows(interleave(runners, options.turns, 1), tokens)
    show(f"{options.preset}, {n} tokens of a stream", found)
    save(options.json, torch=torch.__version__, settings=vars(options), rows=found)


def ours(preset_name: str, n_streams: int, n: int, *, compiled: bool) -> Callable[[], object]:
    preset = PRESETS[preset_name]
    model = ModelConfig(
        vocab_size=VOCAB, block_size=preset.block_size, n_layer=preset.n_layer,
        n_head=preset.n_head, n_embd=preset.n_embd, **RECIPES["modern"]["model"],
    )  # fmt: skip
    train = TrainConfig(recipe="modern", **RECIPES["modern"]["train"])
    backend = NumpyBackend(model, train, initial_state(model, 1))
    config = SampleConfig(seed=1, max_tokens=n + 1)

    def run() -> None:
        decode.COMPILED_FROM = 0 if compiled else 10**12
        writers = [Continuation(TOKENIZER, [0], config, i) for i in range(n_streams)]
        streams = Streams(backend, model, n_streams)
        logits = streams.join([[0]] * n_streams)
        for _ in range(n):
            logits = streams.append(extend(writers, logits))

    return run


def threaded(n_threads: int, run: Callable[[], None]) -> Callable[[], None]:
    def with_threads() -> None:
        torch.set_num_threads(n_threads)
        run()

    return with_threads


if __name__ == "__main__":
    main()
