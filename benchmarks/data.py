"""How fast text becomes tokens: characters, and BPE beside the library `tokenizers` itself.

The two take turns on the same stretches of text in one process, with the same threads; figures are
totals over all stretches. Hashing and framing are part of ours, not of the library's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_randygpt.backends.numpy.backend import available_cores
from mlx_randygpt.data.corpus import Loader
from mlx_randygpt.data.encoding import TextStats, blocks
from mlx_randygpt.data.reading import Piece, pieces
from mlx_randygpt.data.vocabulary import Vocabulary
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

STRETCH = 10_000_000  # characters


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def prepare(file: Path, kind: str, threads: int) -> dict[str, Any]:
    """The whole way from a file to a cache that is safe on the disk, and opening it again."""
    megabytes = file.stat().st_size / 1e6
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        loader = Loader(folder=Path(folder), threads=threads, small=0)
        seconds, _ = timed(lambda: loader.load([file], Vocabulary(kind)))
        again, _ = timed(lambda: loader.load([file], Vocabulary(kind)))
    return {"mb_per_second": megabytes / seconds, "opened_again_seconds": again}


def characters(file: Path, threads: int) -> dict[str, Any]:
    """Reading and encoding alone, with a vocabulary that is known."""
    tokenizer = Vocabulary().learn((piece.text for piece in pieces(file)), 0)
    seconds, n = timed(lambda: sum(map(len, blocks(pieces(file), tokenizer, TextStats(), threads))))
    return {"mb_per_second": file.stat().st_size / 1e6 / seconds, "tokens": n}


def bpe(file: Path, megabytes: float, vocab_size: int, threads: int) -> dict[str, Any]:
    """Ours and the library's `encode_batch` on the same pieces in turns; the ids must agree."""
    parts = list(pieces(file))
    tokenizer = SubwordTokenizer.train("bpe", [part.text for part in parts[:16]], vocab_size)
    library, seconds, n_tokens, n_bytes = tokenizer._model, [0.0, 0.0], 0, 0
    per_stretch = max(1, STRETCH // len(parts[0].text))
    while n_bytes < megabytes * 1e6:
        for i in range(0, len(parts), per_stretch):
            texts = [part.text for part in parts[i : i + per_stretch]]
            stretch = [Piece(text, False, False) for text in texts]
            ours, ids = timed(lambda s=stretch: list(blocks(s, tokenizer, TextStats(), threads)))
            theirs, batch = timed(lambda t=texts: library.encode_batch(t, add_special_tokens=False))
            assert [x for block in ids for x in block] == [x for one in batch for x in one.ids]
            seconds = [seconds[0] + ours, seconds[1] + theirs]
            n_tokens += sum(map(len, ids))
            n_bytes += sum(len(text.encode()) for text in texts)
            if n_bytes >= megabytes * 1e6:
                break
    return {
        "megabytes": n_bytes / 1e6,
        "tokens": n_tokens,
        "mb_per_second": n_bytes / 1e6 / seconds[0],
        "library_mb_per_second": n_bytes / 1e6 / seconds[1],
        "ratio": seconds[1] / seconds[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a text of 100 MB or so")
    parser.add_argument("--megabytes", type=float, default=100, help="of BPE, text repeated")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.threads))  # before the library is used
    file, threads = options.data, options.threads
    results = {
        "threads": threads,
        "char": characters(file, threads),
        "char_prepared": prepare(file, "char", threads),
        "bpe": bpe(file, options.megabytes, options.vocab_size, threads),
    }
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
