"""How fast copies are found: a sample with planted runs against synthetic text, and the memory.

The text is words of a small vocabulary, kept as tokens in a file as the cache keeps them. It is
decoded and searched; every planted run must be found.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.analysis.copies import Copies, find_copies
from mlx_randygpt.data.decoding import decoded
from mlx_randygpt.data.token_file import OpenFile, TokenFile
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

LETTERS = "etaoinshrdlucmfwygpb"
N_WORDS = 5000
PIECE = 1 << 20  # characters made at a time
PLANTED = (60, 200)  # lengths of the runs that the sample copies
REPEATS = 5  # of short texts; the median counts


def make_text(letters: np.random.Generator, words: list[str], size: int) -> str:
    """Words by Zipf's law, about as frequent as in prose, with a line break now and then."""
    ranks = (N_WORDS ** letters.random(size // 4)).astype(int) - 1
    ends = np.where(letters.random(len(ranks)) < 0.1, "\n", " ")
    return "".join(words[i] + end for i, end in zip(ranks, ends, strict=True))[:size]


def write_tokens(path: Path, megabytes: float, kind: str) -> tuple[Tokenizer, str]:
    """Write the tokens of a synthetic text; return their tokenizer and a sample."""
    letters = np.random.default_rng(1)
    lengths = letters.integers(2, 10, N_WORDS)
    words = ["".join(letters.choice([*LETTERS], n)) for n in lengths]
    n_left, copied, first = int(megabytes * 1e6), list[str](), make_text(letters, words, PIECE)
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer.train(first)
    else:
        tokenizer = SubwordTokenizer.train("bpe", [first], 4096)
    with path.open("wb") as file:
        while n_left > 0:
            text = make_text(letters, words, min(PIECE, n_left))
            copied = copied or [text[1000 * n : 1000 * n + n] for n in PLANTED]
            n_left -= len(text)
            file.write(tokenizer.encode(text).astype(np.uint16).tobytes())
    own = make_text(letters, words, 900)
    return tokenizer, own[:300] + copied[0] + own[300:600] + copied[1] + own[600:]


def measure(folder: Path, megabytes: float, kind: str) -> dict[str, Any]:
    """Search one text; return seconds, rate and the growth of the process."""
    path = folder / "text.tokens"
    tokenizer, sample = write_tokens(path, megabytes, kind)
    seconds, found = [], list[Copies]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(REPEATS if megabytes <= 100 else 1):
        began = time.perf_counter()
        tokens = TokenFile(OpenFile(path), np.dtype(np.uint16), path.stat().st_size // 2)
        found = find_copies([sample], decoded(tokens, tokenizer))
        seconds.append(time.perf_counter() - began)
    runs = [passage.stop - passage.start for passage in found[0].passages]
    assert all(any(run >= n for run in runs) for n in PLANTED), runs
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1e6 if sys.platform == "darwin" else 1e3
    return {
        "kind": kind,
        "megabytes": megabytes,
        "seconds": round(float(np.median(seconds)), 3),
        "mb_per_second": round(megabytes / float(np.median(seconds)), 1),
        "peak_growth_mb": round((after - before) / scale, 1),
        "sample_characters": len(sample),
        "passages": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 1000])
    parser.add_argument("--tokenizers", nargs="+", choices=["char", "bpe"], default=["char", "bpe"])
    args = parser.parse_args()
    for kind in args.tokenizers:
        for megabytes in args.megabytes:
            with (
                tempfile.TemporaryDirectory() as folder,
                ProcessPoolExecutor(1, get_context("spawn")) as process,  # with its own peak
            ):
                row = process.submit(measure, Path(folder), megabytes, kind).result()
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
