"""How fast `mlxgpt data check` reads a long text, in how much memory, and whether it finds all.

The text is synthetic: random words in documents of about 20 kB, a tenth of which are copies, with
passages of training documents planted in the documents at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlx_randygpt.data.audit import audit
from mlx_randygpt.data.reading import Piece, Reading, all_pieces

WORDS = 40_000  # different
DOCUMENT_WORDS = 3000
PLANTED = 2000  # characters of each passage
LINE = "All rights reserved. Do not copy this text."


def write(file: Path, megabytes: float, seed: int = 1) -> dict[str, int]:
    """Write the text as rows; return what was planted in it."""
    draw = random.Random(seed)
    words = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9)))
        for _ in range(WORDS)
    ]
    size, n, copies, leaks, lines, first = 0, 0, 0, 0, 0, list[str]()
    with file.open("w") as stream:
        while size < megabytes * 1e6:
            text = " ".join(draw.choices(words, k=DOCUMENT_WORDS))
            if n % 10 == 5:
                text, copies = draw.choice(first), copies + 1
            elif n % 100 == 1:
                text = f"{text}\n{LINE}\n"
            if len(first) < 100 and n % 10 != 5:
                first.append(text)
            if size > 0.95 * megabytes * 1e6 and n % 50 == 7:
                at = draw.randrange(len(first[0]) - PLANTED)
                text, leaks = f"{text} {draw.choice(first)[at : at + PLANTED]}", leaks + 1
            lines += LINE in text
            size += stream.write(json.dumps({"text": text}) + "\n")
            n += 1
    return {"documents": n, "copies": copies, "leaks": leaks, "lines": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text.jsonl")
        planted = write(file, options.megabytes)

        def source() -> Iterator[tuple[int, Piece]]:
            return all_pieces([file], Reading())

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, cpu = time.perf_counter(), time.process_time()
        found = audit(source)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        results = {
            "megabytes": file.stat().st_size / 1e6,
            "planted": planted,
            "copies": found.n_copies,
            "leaks": found.n_leaks,
            "leaked": found.leaked,
            "repeated": found.repeated,
            "lines": found.lines[:1],
            "sampled": [found.sampled, found.sampled_repeats],
            "seconds": seconds,
            "cpu_seconds": cpu,
            "mb_per_second": file.stat().st_size / 1e6 / seconds,
            "before_mb": before / 1024,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
